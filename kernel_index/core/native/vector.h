// What follows from the vectors of avx512.h or avx2.h.
namespace {

// Rows become columns: four rounds of a perfect shuffle.
inline void transpose(Vec (&square)[LANES]) {
  for (int64_t round = 0; round < 4; ++round) {
    Vec next[LANES];
    for (int64_t i = 0; i < LANES / 2; ++i)
      std::tie(next[2 * i], next[2 * i + 1]) = interleave(square[i], square[i + LANES / 2]);
    std::copy_n(next, LANES, square);
  }
}

inline float sum_of(Vec v) { return reduce(v, [](Vec a, Vec b) { return a + b; }); }
inline float max_of(Vec v) { return reduce(v, [](Vec a, Vec b) { return larger(a, b); }); }

// The exponential for results that become bfloat16.  exp(x) = 2^floor(y) · 2^f with y = x · log2(e) and f its fraction;
// the polynomial is the minimax one of 2^f on [0, 1], exact at 0, with a relative error of 1e-7.
inline Vec exponential(Vec x, BFloat16) {
  const Vec y = x * Vec(1.44269504f), f = fraction_of(y);
  Vec p = fmadd(f, Vec(0.0018671301659196615f), Vec(0.009017029777169228f));
  p = fmadd(f, p, Vec(0.05579991266131401f));
  p = fmadd(f, p, Vec(0.24016444385051727f));
  p = fmadd(f, p, Vec(0.6931512951850891f));
  p = fmadd(f, p, Vec(1.f));
  return times_power_of_2(p, y);
}
inline Vec exponential(Vec x, float) { return x.exp(); }

}  // namespace
