// Sixteen floats in an AVX-512 register, and products by oneDNN's brgemm.  avx2.h has the same for other machines.
// The functions of PyTorch's library that we call are declared by hand.
namespace at::native::cpublas {

void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
            const float* B, float* C, bool in_pairs);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* A,
            const c10::BFloat16* B, float* C, bool in_pairs);
void brgemm_release(bool in_pairs);

}  // namespace at::native::cpublas

extern "C" {
__m512 Sleef_expf16_u10(__m512);
__m512 Sleef_tanhf16_u10(__m512);
__m512 Sleef_logf16_u10(__m512);
__m512 Sleef_log1pf16_u10(__m512);
__m512 Sleef_erff16_u10(__m512);
__m512d Sleef_cosd8_u10(__m512d);
__m512d Sleef_sind8_u10(__m512d);
}

namespace {

constexpr int64_t LANES = 16;
using Lanes = __mmask16;  // those of a vector that something is true of

inline Lanes first_lanes(int64_t n) { return n >= LANES ? 0xffff : (1 << n) - 1; }
inline Lanes lanes_of(uint16_t bits) { return bits; }
inline bool every(Lanes lanes) { return lanes == 0xffff; }

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
  Vec log() const { return Sleef_logf16_u10(x); }
  Vec log1p() const { return Sleef_log1pf16_u10(x); }
  Vec erf() const { return Sleef_erff16_u10(x); }
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

// The lanes in which s does not lie in [start, end).
inline Lanes outside(int32_t s, const int32_t* start, const int32_t* end) {
  const __m512i at = _mm512_set1_epi32(s);
  return _mm512_cmplt_epi32_mask(at, _mm512_loadu_si512(start)) | _mm512_cmpge_epi32_mask(at, _mm512_loadu_si512(end));
}

// The lanes from the n-th on, of any n.
inline Lanes lanes_from(int32_t n) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(n));
}

// {a0, b0, a1, b1, …} in two vectors.
inline std::pair<Vec, Vec> interleave(Vec a, Vec b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.x, low, b.x), _mm512_permutex2var_ps(a.x, high, b.x)};
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

// {a0, b0, a1, b1, …}: the first n ≤ LANES elements of two rows, and zeros; b may be null.
inline void store_pairs(BFloat16* to, const BFloat16* a, const BFloat16* b, int64_t n) {
  const Lanes some = n > 0 ? first_lanes(n) : 0;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(b ? some : 0, b));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

inline Vec fraction_of(Vec v) { return _mm512_reduce_ps(v.x, _MM_FROUND_TO_NEG_INF); }       // v − floor(v); 0 of ±∞
inline Vec times_power_of_2(Vec v, Vec power) { return _mm512_scalef_ps(v.x, power.x); }     // v · 2^floor(power)

struct Doubles {
  static constexpr int64_t LANES = 8;
  __m512d x;
  static Doubles load(const double* from, int64_t n) { return {_mm512_maskz_loadu_pd(lanes(n), from)}; }
  void store(double* to, int64_t n) const { _mm512_mask_storeu_pd(to, lanes(n), x); }
  Doubles cos() const { return {Sleef_cosd8_u10(x)}; }
  Doubles sin() const { return {Sleef_sind8_u10(x)}; }

 private:
  static __mmask8 lanes(int64_t n) { return n >= LANES ? 0xff : (1 << n) - 1; }
};

// C [M, N] = or += A [M, R] B [R, N]; the rows of A, B and C are `a`, `b` and `c` elements apart.
template <typename T>
inline void multiply_block(int64_t M, int64_t N, int64_t R, int64_t a, int64_t b, int64_t c, bool add, const T* A,
                           const T* B, float* C) {
  at::native::cpublas::brgemm(M, N, R, a, b, c, add, A, B, C, std::is_same_v<T, BFloat16>);
}
inline void release_matrix_units() { at::native::cpublas::brgemm_release(true); }

}  // namespace
