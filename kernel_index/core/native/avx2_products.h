// Products for CPUs without oneDNN's brgemm.  An element is one chain of fused additions over R in rising order, as it is
// there, so neither its neighbours nor the size of the block have a part in it.
namespace {

// One row of the right operand, or two of bfloat16: sixteen columns.
struct Right {
  Vec first, second;
};
template <bool WHOLE>
inline Right right_at(const float* from, int64_t n) {
  return {WHOLE ? Vec::loadu(from) : load(from, n), Vec()};
}
template <bool WHOLE>
inline Right right_at(const BFloat16* from, int64_t n) {
  const Vec pairs = WHOLE ? Vec::loadu(reinterpret_cast<const float*>(from)) : load(reinterpret_cast<const float*>(from), n);
  const __m256i low = _mm256_castps_si256(pairs.low), high = _mm256_castps_si256(pairs.high);
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))}};
}

inline void add_product(Vec& sum, const float* left, Right right) { sum = fmadd(Vec(*left), right.first, sum); }
inline void add_product(Vec& sum, const BFloat16* left, Right right) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof(pair));
  const __m256i all = _mm256_set1_epi32(pair);
  const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
  const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(0xffff0000)));
  sum = fmadd(Vec(odd, odd), right.second, fmadd(Vec(even, even), right.first, sum));
}

// ROWS rows by sixteen columns, of which n exist; their sums stay in registers.
template <int64_t ROWS, bool WHOLE, typename T>
inline void multiply_strip(int64_t R, int64_t n, int64_t a, int64_t b, int64_t c, bool add, const T* A, const T* B, float* C) {
  constexpr int64_t PAIR = std::is_same_v<T, float> ? 1 : 2;
  Vec sums[ROWS];
  if (add)
    for (int64_t i = 0; i < ROWS; ++i) sums[i] = WHOLE ? Vec::loadu(C + i * c) : load(C + i * c, n);
  for (int64_t r = 0; r < R; r += PAIR) {
    const Right right = right_at<WHOLE>(B + r * b, n);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) add_product(sums[i], A + i * a + r, right);
  }
  for (int64_t i = 0; i < ROWS; ++i) WHOLE ? sums[i].store(C + i * c) : sums[i].store(C + i * c, n);
}

template <int64_t ROWS, typename T>
inline void multiply_rows(int64_t M, int64_t R, int64_t n, int64_t a, int64_t b, int64_t c, bool add, const T* A,
                          const T* B, float* C) {
  for (; M >= ROWS; M -= ROWS, A += ROWS * a, C += ROWS * c)
    n >= LANES ? multiply_strip<ROWS, true>(R, n, a, b, c, add, A, B, C)
               : multiply_strip<ROWS, false>(R, n, a, b, c, add, A, B, C);
  if constexpr (ROWS > 1)
    if (M) multiply_rows<ROWS / 2>(M, R, n, a, b, c, add, A, B, C);
}

// C [M, N] = or += A [M, R] B [R, N]; the rows of A, B and C are `a`, `b` and `c` elements apart.  R is even in bfloat16,
// whose right operand is packed in pairs of rows.
template <typename T>
inline void multiply_block(int64_t M, int64_t N, int64_t R, int64_t a, int64_t b, int64_t c, bool add, const T* A,
                           const T* B, float* C) {
  constexpr int64_t ROWS = 6, PAIR = std::is_same_v<T, float> ? 1 : 2;
  for (int64_t j = 0; j < N; j += LANES) multiply_rows<ROWS>(M, R, N - j, a, b, c, add, A, B + j * PAIR, C + j);
}
inline void release_matrix_units() {}

}  // namespace
