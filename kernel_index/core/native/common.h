// Memory, matrix products and the packing of their operands.
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that is not initialised: a page that is never written is never allocated.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t n) : data(new T[std::max<int64_t>(n, 1)]) {}
  T* at(int64_t i) const { return data.get() + i; }
};

// C [M, N] = or += A [M, R] B [R, N]; B is packed by `packed_at`.  Where M is rounded up, the rows past the last are
// scratch.  The rows of A are `stride` elements apart (0: R), those of C `row` elements (0: N).
template <typename T>
inline void product(int64_t M, int64_t N, int64_t R, const T* A, const T* B, float* C, bool add = false,
                    int64_t stride = 0, int64_t row = 0) {
  multiply_block(M, N, R, stride ? stride : R, N, row ? row : N, add, A, B, C);
}

// A thread that calls `product` holds one of these.  With AMX the first product of a shape configures the tile
// registers. PyTorch takes them for configured until `brgemm_release`, but any other library may reset them in between.
struct MatrixUnits {
  MatrixUnits() = default;
  MatrixUnits(const MatrixUnits&) = delete;
  ~MatrixUnits() { release_matrix_units(); }
};

// Index of element (r, j) in a packed right operand [R, N]: by rows, or by pairs of rows in bfloat16.
template <typename T>
inline int64_t packed_at(int64_t r, int64_t j, int64_t N) {
  if constexpr (std::is_same_v<T, BFloat16>) return (r / 2) * N * 2 + j * 2 + r % 2;
  return r * N + j;
}

// Packs blocks of x [B, S, K, W] as right operands: [B, K, blocks] of [padded, W], or transposed, of [W, padded].
template <typename T>
void pack_blocks(const T* x, T* into, int64_t B, int64_t S, int64_t K, int64_t W, int64_t block, int64_t padded,
                 bool transposed, int64_t threads) {
  const int64_t blocks = (S + block - 1) / block;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < B * K * blocks; ++i) {
    const int64_t j = i % blocks, h = i / blocks % K, b = i / blocks / K;
    T* to = into + i * padded * W;
    for (int64_t s = 0; s < padded; ++s) {
      const bool exists = s < block && j * block + s < S;
      const T* from = x + ((b * S + j * block + s) * K + h) * W;
      for (int64_t d = 0; d < W; ++d)
        to[transposed ? packed_at<T>(d, s, padded) : packed_at<T>(s, d, W)] = exists ? from[d] : T(0);
    }
  }
}

// The dot product of a [n] and b [n]; `a` is readable up to a whole vector.
template <typename T>
inline float dot(const float* a, const T* b, int64_t n) {
  Vec sum(0.f);
  for (int64_t i = 0; i < n; i += LANES) sum = fmadd(Vec::loadu(a + i), load(b + i, n - i), sum);
  return sum_of(sum);
}

}  // namespace
