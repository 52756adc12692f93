// What avx512.h has, for CPUs with AVX2 and FMA: sixteen floats in two registers, and products of our own.
extern "C" {
__m256 Sleef_expf8_u10(__m256);
__m256 Sleef_tanhf8_u10(__m256);
__m256 Sleef_logf8_u10(__m256);
__m256 Sleef_log1pf8_u10(__m256);
__m256 Sleef_erff8_u10(__m256);
__m256d Sleef_cosd4_u10(__m256d);
__m256d Sleef_sind4_u10(__m256d);
}

namespace {

constexpr int64_t LANES = 16;

// Those lanes of a vector that something is true of: all bits of a lane, or none.
struct Lanes {
  __m256 low, high;
};
inline Lanes operator|(Lanes a, Lanes b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Lanes operator~(Lanes a) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.low, all), _mm256_xor_ps(a.high, all)};
}

inline Lanes as_lanes(__m256i low, __m256i high) { return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)}; }

// The lanes before the n-th, of any n.
inline Lanes first_lanes(int64_t n) {
  const __m256i count = _mm256_set1_epi32(std::clamp<int64_t>(n, 0, LANES)), lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return as_lanes(_mm256_cmpgt_epi32(count, lane), _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8))));
}
inline Lanes lanes_of(uint16_t bits) {
  const __m256i all = _mm256_set1_epi32(bits), low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return as_lanes(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high));
}
inline bool every(Lanes lanes) { return _mm256_movemask_ps(_mm256_and_ps(lanes.low, lanes.high)) == 0xff; }

struct Vec {
  __m256 low, high;

  Vec() : low(_mm256_setzero_ps()), high(_mm256_setzero_ps()) {}
  Vec(__m256 low, __m256 high) : low(low), high(high) {}
  Vec(float value) : low(_mm256_set1_ps(value)), high(low) {}

  static Vec loadu(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  void store(float* to) const { _mm256_storeu_ps(to, low), _mm256_storeu_ps(to + 8, high); }
  void store(float* to, int64_t n) const {
    if (n >= LANES) return store(to);
    const Lanes some = first_lanes(n);
    _mm256_maskstore_ps(to, _mm256_castps_si256(some.low), low);
    _mm256_maskstore_ps(to + 8, _mm256_castps_si256(some.high), high);
  }

  Vec exp() const { return {Sleef_expf8_u10(low), Sleef_expf8_u10(high)}; }
  Vec tanh() const { return {Sleef_tanhf8_u10(low), Sleef_tanhf8_u10(high)}; }
  Vec log() const { return {Sleef_logf8_u10(low), Sleef_logf8_u10(high)}; }
  Vec log1p() const { return {Sleef_log1pf8_u10(low), Sleef_log1pf8_u10(high)}; }
  Vec erf() const { return {Sleef_erff8_u10(low), Sleef_erff8_u10(high)}; }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
template <int HOW>
inline Lanes compare(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, HOW), _mm256_cmp_ps(a.high, b.high, HOW)};
}
inline Lanes operator==(Vec a, Vec b) { return compare<_CMP_EQ_OQ>(a, b); }
inline Lanes operator<=(Vec a, Vec b) { return compare<_CMP_LE_OQ>(a, b); }
inline Lanes is_nan(Vec a) { return compare<_CMP_UNORD_Q>(a, a); }

// a, and b in the lanes of `where`.
inline Vec select(Lanes where, Vec a, Vec b) {
  return {_mm256_blendv_ps(a.low, b.low, where.low), _mm256_blendv_ps(a.high, b.high, where.high)};
}

inline Vec fmadd(Vec a, Vec b, Vec c) {  // a · b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec fmsub(Vec a, Vec b, Vec c) {  // a · b − c
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}

// The larger of two, and NaN where either is NaN: the instruction returns its second operand there.
inline Vec larger(Vec a, Vec b) {
  return select(is_nan(a), {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}, a);
}

// The positive part; NaN stays NaN, as the second operand.
inline Vec positive(Vec v) {
  return {_mm256_max_ps(_mm256_setzero_ps(), v.low), _mm256_max_ps(_mm256_setzero_ps(), v.high)};
}

inline __m256i load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The lanes in which s does not lie in [start, end).
inline Lanes outside(int32_t s, const int32_t* start, const int32_t* end) {
  const auto below = [at = _mm256_set1_epi32(s)](const int32_t* bound) {
    return as_lanes(_mm256_cmpgt_epi32(load_words(bound), at), _mm256_cmpgt_epi32(load_words(bound + 8), at));
  };
  return below(start) | ~below(end);
}

// The lanes from the n-th on, of any n.
inline Lanes lanes_from(int32_t n) { return ~first_lanes(n); }

// {a0, b0, a1, b1, …} in two vectors.
inline std::pair<Vec, Vec> interleave(Vec a, Vec b) {
  const auto halves = [](__m256 a, __m256 b) -> Vec {
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    return {_mm256_permute2f128_ps(even, odd, 0x20), _mm256_permute2f128_ps(even, odd, 0x31)};
  };
  return {halves(a.low, b.low), halves(a.high, b.high)};
}

// Combines the lanes in four halvings: 16 to 8, to 4, to 2, to 1.
template <typename Combine>
inline float reduce(Vec v, Combine combine) {
  const auto each = [&](__m256 other) { v = combine(v, Vec(other, other)); };
  each(v.high);
  each(_mm256_permute2f128_ps(v.low, v.low, 0x01));
  each(_mm256_permute_ps(v.low, 0x4e));
  each(_mm256_permute_ps(v.low, 0xb1));
  return _mm256_cvtss_f32(v.low);
}

// Up to LANES elements of a row of which n are left; the others are 0.
inline Vec load(const float* from, int64_t n) {
  if (n >= LANES) return Vec::loadu(from);
  const Lanes some = first_lanes(n);
  return {_mm256_maskload_ps(from, _mm256_castps_si256(some.low)),
          _mm256_maskload_ps(from + 8, _mm256_castps_si256(some.high))};
}

inline Vec widened(__m256i half) {
  const auto wide = [](__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); };
  return {wide(_mm256_castsi256_si128(half)), wide(_mm256_extracti128_si256(half, 1))};
}

// The bits of the first n ≤ LANES elements; the others are 0.
inline __m256i load_half(const BFloat16* from, int64_t n) {
  if (n >= LANES) return load_words(from);
  alignas(32) uint16_t some[LANES] = {};
  std::memcpy(some, from, std::max<int64_t>(n, 0) * sizeof(uint16_t));
  return load_words(some);
}
inline Vec load(const BFloat16* from, int64_t n) { return widened(load_half(from, n)); }

// As the constructor of BFloat16 rounds, but that a NaN becomes 0xffff.
inline __m256i to_bfloat16(Vec v) {
  const auto bits = [](__m256 x) {
    const __m256i wide = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(wide, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_or_si256(_mm256_srli_epi32(rounded, 16), _mm256_srli_epi32(nan, 16));
  };
  const __m256i packed = _mm256_packus_epi32(bits(v.low), bits(v.high));  // by 128 bits: 0 … 3, 8 … 11, 4 … 7, 12 … 15
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

inline void store(float* to, Vec v, int64_t n = LANES) { v.store(to, n); }
inline void store(BFloat16* to, Vec v, int64_t n = LANES) {
  const __m256i half = to_bfloat16(v);
  if (n >= LANES) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  std::memcpy(to, &half, std::max<int64_t>(n, 0) * sizeof(uint16_t));
}

// {a0, b0, a1, b1, …}: the first n ≤ LANES elements of two rows, and zeros; b may be null.
inline void store_pairs(BFloat16* to, const BFloat16* a, const BFloat16* b, int64_t n) {
  const __m256i x = load_half(a, n), y = b ? load_half(b, n) : _mm256_setzero_si256();
  const __m256i even = _mm256_unpacklo_epi16(x, y), odd = _mm256_unpackhi_epi16(x, y);
  __m256i* const into = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(into, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(into + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}

// x between −252 and 252, which the powers of 2 below are for; NaN stays NaN, as the second operand.
inline __m256 clamped(__m256 x) { return _mm256_max_ps(_mm256_set1_ps(-252.f), _mm256_min_ps(_mm256_set1_ps(252.f), x)); }

inline Vec fraction_of(Vec v) {  // v − floor(v); 0 of ±∞
  const auto of = [](__m256 x) { return x = clamped(x), _mm256_sub_ps(x, _mm256_floor_ps(x)); };
  return {of(v.low), of(v.high)};
}

// v · 2^floor(power), with one rounding if 1 ≤ v < 2.
inline Vec times_power_of_2(Vec v, Vec power) {
  const auto exp2 = [](__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  };
  const auto of = [&](__m256 x, __m256 power) {  // two factors: 2⁻²⁵² is no number
    const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(clamped(power))), half = _mm256_srai_epi32(n, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, exp2(half)), exp2(_mm256_sub_epi32(n, half)));
  };
  return {of(v.low, power.low), of(v.high, power.high)};
}

struct Doubles {
  static constexpr int64_t LANES = 4;
  __m256d x;
  static Doubles load(const double* from, int64_t n) { return {_mm256_maskload_pd(from, lanes(n))}; }
  void store(double* to, int64_t n) const { _mm256_maskstore_pd(to, lanes(n), x); }
  Doubles cos() const { return {Sleef_cosd4_u10(x)}; }
  Doubles sin() const { return {Sleef_sind4_u10(x)}; }

 private:
  static __m256i lanes(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};

}  // namespace
