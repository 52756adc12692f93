// What the native kernels share: rows of a product, operands packed for it, and the exponential of each dtype.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr float INF = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that nothing clears: a page that is never written costs nothing.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t n) : data(new T[std::max<int64_t>(n, 1)]) {}
  T* at(int64_t i) const { return data.get() + i; }
};

// C [M, N] = or += A [M, R] B [R, N]; B is packed by `packed_at`.  M is rounded up: rows behind the last are scratch.
// Rows of A stand `stride` apart, R where it is 0; those of C `row`, N where it is 0.
template <typename T>
inline void product(int64_t M, int64_t N, int64_t R, const T* A, const T* B, float* C, bool add = false,
                    int64_t stride = 0, int64_t row = 0) {
  at::native::cpublas::brgemm(M, N, R, stride ? stride : R, N, row ? row : N, add, A, B, C, std::is_same_v<T, BFloat16>);
}

// A thread that multiplies holds one of these.  On a machine with AMX the first product of a shape configures the tiles;
// PyTorch believes them configured until they are given back, while any other library may reset them in between.
struct MatrixUnits {
  MatrixUnits() = default;
  MatrixUnits(const MatrixUnits&) = delete;
  ~MatrixUnits() { at::native::cpublas::brgemm_release(); }
};

// Where element (r, j) of a right operand [R, N] stands: by rows, or by pairs of rows in bfloat16.
template <typename T>
inline int64_t packed_at(int64_t r, int64_t j, int64_t N) {
  if constexpr (std::is_same_v<T, BFloat16>) return (r / 2) * N * 2 + j * 2 + r % 2;
  return r * N + j;
}

// Blocks of x [B, S, K, W] as right operands: [B, K, blocks] of [padded, W], or of their transposes [W, padded].
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

inline Vec exponential(Vec x, float) { return x.exp(); }
inline Vec exponential(Vec x, BFloat16) { return x.exp_u20(); }  // right to more digits than bfloat16 keeps

inline void store(float* to, Vec x) { x.store(to); }
inline void store(BFloat16* to, Vec x) { at::vec::convert<BFloat16>(x).store(to, LANES); }

inline float sum_of(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}
inline float max_of(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// Up to LANES elements of a row, n of them there.
inline Vec load(const float* x, int64_t n) { return n >= LANES ? Vec::loadu(x) : Vec::loadu(x, n); }
inline Vec load(const BFloat16* x, int64_t n) {
  using Half = at::vec::Vectorized<BFloat16>;
  return at::vec::convert<float>(Half::loadu(x, std::min(n, LANES)));
}

// The product of two rows of n; `a` is readable up to whole vectors.
template <typename T>
inline float dot(const float* a, const T* b, int64_t n) {
  Vec sum(0.f);
  for (int64_t i = 0; i < n; i += LANES) sum = at::vec::fmadd(Vec::loadu(a + i), load(b + i, n - i), sum);
  return sum_of(sum);
}

// Which slot of a paged cache holds token s of row b; without a table row b's tokens lie one after the other.
inline int64_t slot_of(const int32_t* table, int64_t table_width, int64_t page, int64_t b, int64_t s) {
  return table_width ? table[b * table_width + s / page] * page + s % page : b * page + s;
}

// A row of products in place: times scale, and capped.
inline void finish_scores(float* z, int64_t width, float scale, float softcap) {
  for (int64_t i = 0; i < width; i += LANES) {
    Vec x = Vec::loadu(z + i) * Vec(scale);
    if (softcap != 0) x = Vec(softcap) * (x / Vec(softcap)).tanh();
    x.store(z + i);
  }
}

// A score and its block as one integer: a larger score is larger, among equals the smaller block.  As sparse/ordered.py.
inline int64_t key_of(float score, int64_t j) {
  const float plus = score + 0.f;  // −0 and 0 are a tie
  int32_t bits;
  std::memcpy(&bits, &plus, sizeof bits);
  return (static_cast<int64_t>(bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (0x7FFFFFFF - j);
}
inline int64_t block_of(int64_t key) { return 0x7FFFFFFF - (key & 0x7FFFFFFF); }
inline float score_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The best `most` of a row's scores, offered by ascending place.  Keys are collected and cut to the best now and then, so
// that a score costs the same however many are kept; once there are enough, whatever is not above the least is skipped.
// NaN is above +∞, whatever its sign.
struct TopScores {
  std::vector<int64_t> keys;
  int64_t most = 0;
  float least = -INF;
  bool full = false;

  void begin(int64_t kept) {
    keys.clear();
    most = kept;
    least = -INF;
    full = false;
  }

  void offer(float score, int64_t place) {
    keys.push_back(key_of(std::isnan(score) ? std::numeric_limits<float>::quiet_NaN() : score, place));
    if (int64_t(keys.size()) >= 2 * most + 64) cut();
  }

  // Scores z[low .. high) of the places from `first` on; whole vectors around them are readable.
  void scan(const float* z, int64_t low, int64_t high, int64_t first) {
    if (most == 0) return;
    for (int64_t i = low / LANES * LANES; i < high; i += LANES) {
      // Places ascend, so a score that only equals the least one has the larger place and loses.
      if (full && (Vec::loadu(z + i) <= Vec(least)).zero_mask() == 0) continue;
      for (int64_t x = std::max(i, low); x < std::min(i + LANES, high); ++x)
        if (!full || !(z[x] <= least)) offer(z[x], first + x);
    }
  }

  // Afterwards `keys` are the best, in any order.
  void cut() {
    if (int64_t(keys.size()) < std::max<int64_t>(most, 1)) return;
    if (most > 0) std::nth_element(keys.begin(), keys.begin() + most - 1, keys.end(), std::greater<>());
    keys.resize(most);
    full = true;
    if (most > 0) least = score_of(keys[most - 1]);
  }
};

}  // namespace
