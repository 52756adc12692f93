// Sixteen floats in an AVX-512 register, and bfloat16.  PyTorch's headers have the same and cost each source 2 s of
// compilation, so the functions of its library that we call are declared here by hand.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace c10 {

// As PyTorch has it: its name is part of the name of `brgemm` below.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(float x) {  // rounds to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof(x));
    bits = std::isnan(x) ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
};

}  // namespace c10

namespace at::native::cpublas {

void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
            const float* B, float* C, bool in_pairs);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* A,
            const c10::BFloat16* B, float* C, bool in_pairs);
void brgemm_release(bool in_pairs);

}  // namespace at::native::cpublas

extern "C" __m512 Sleef_expf16_u10(__m512);
extern "C" __m512 Sleef_tanhf16_u10(__m512);

namespace {

using c10::BFloat16;
constexpr int64_t LANES = 16;
using Lanes = __mmask16;  // a bit for each lane
constexpr Lanes EVERY_LANE = 0xffff;

inline Lanes first_lanes(int64_t n) { return n >= LANES ? EVERY_LANE : (1 << n) - 1; }

struct Vec {
  __m512 x;

  Vec() : x(_mm512_setzero_ps()) {}
  Vec(__m512 value) : x(value) {}
  Vec(float value) : x(_mm512_set1_ps(value)) {}

  static Vec loadu(const float* from) { return _mm512_loadu_ps(from); }
  void store(float* to) const { _mm512_storeu_ps(to, x); }
  void store(float* to, int64_t n) const { _mm512_mask_storeu_ps(to, first_lanes(n), x); }

  Vec exp() const { return Sleef_expf16_u10(x); }
  Vec tanh() const { return Sleef_tanhf16_u10(x); }
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.x, b.x); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.x, b.x); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.x, b.x); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.x, b.x); }
inline Lanes operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ); }
inline Lanes operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ); }
inline Lanes is_nan(Vec a) { return _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q); }

// a, and b in the lanes of `where`.
inline Vec select(Lanes where, Vec a, Vec b) { return _mm512_mask_blend_ps(where, a.x, b.x); }

inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }  // a · b + c
inline Vec fmsub(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a.x, b.x, c.x); }  // a · b − c

// The larger of two, and NaN where either is NaN: the instruction returns its second operand there.
inline Vec larger(Vec a, Vec b) { return select(is_nan(a), _mm512_max_ps(a.x, b.x), a); }

// The positive part; NaN stays NaN, as the second operand.
inline Vec positive(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v.x); }

// {a0, b0, a1, b1, …} in two vectors.
inline std::pair<Vec, Vec> interleave(Vec a, Vec b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.x, low, b.x), _mm512_permutex2var_ps(a.x, high, b.x)};
}

// Rows become columns: four rounds of a perfect shuffle.
inline void transpose(Vec (&square)[LANES]) {
  for (int64_t round = 0; round < 4; ++round) {
    Vec next[LANES];
    for (int64_t i = 0; i < LANES / 2; ++i)
      std::tie(next[2 * i], next[2 * i + 1]) = interleave(square[i], square[i + LANES / 2]);
    std::copy_n(next, LANES, square);
  }
}

// Combines the lanes in four halvings: 16 to 8, to 4, to 2, to 1.
template <typename Combine>
inline float reduce(Vec v, Combine combine) {
  v = combine(v, Vec(_mm512_shuffle_f32x4(v.x, v.x, 0x4e)));
  v = combine(v, Vec(_mm512_shuffle_f32x4(v.x, v.x, 0xb1)));
  v = combine(v, Vec(_mm512_shuffle_ps(v.x, v.x, 0x4e)));
  v = combine(v, Vec(_mm512_shuffle_ps(v.x, v.x, 0xb1)));
  return _mm512_cvtss_f32(v.x);
}
inline float sum_of(Vec v) { return reduce(v, [](Vec a, Vec b) { return a + b; }); }
inline float max_of(Vec v) { return reduce(v, [](Vec a, Vec b) { return larger(a, b); }); }

// Up to LANES elements of a row of which n are left; the others are 0.
inline Vec load(const float* from, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), from); }
inline Vec load(const BFloat16* from, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// As the constructor of BFloat16 rounds, but that a NaN becomes 0xffff.
inline __m256i to_bfloat16(Vec v) {
  const __m512i wide = _mm512_castps_si512(v.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i bits = _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), is_nan(v), 0xffff);
  return _mm512_cvtepi32_epi16(bits);
}

inline void store(float* to, Vec v, int64_t n = LANES) { v.store(to, n); }
inline void store(BFloat16* to, Vec v, int64_t n = LANES) {
  _mm256_mask_storeu_epi16(to, first_lanes(n), to_bfloat16(v));
}

// The exponential for results that become bfloat16.  exp(x) = 2^floor(y) · 2^f with y = x · log2(e) and f its fraction;
// the polynomial is the minimax one of 2^f on [0, 1], exact at 0, with a relative error of 1e-7.
inline Vec exponential(Vec x, BFloat16) {
  const Vec y = x * Vec(1.44269504f), f = _mm512_reduce_ps(y.x, _MM_FROUND_TO_NEG_INF);
  Vec p = fmadd(f, Vec(0.0018671301659196615f), Vec(0.009017029777169228f));
  p = fmadd(f, p, Vec(0.05579991266131401f));
  p = fmadd(f, p, Vec(0.24016444385051727f));
  p = fmadd(f, p, Vec(0.6931512951850891f));
  p = fmadd(f, p, Vec(1.f));
  return _mm512_scalef_ps(p.x, y.x);
}
inline Vec exponential(Vec x, float) { return x.exp(); }

}  // namespace
