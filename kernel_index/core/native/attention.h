// Softmax attention in float32: how a product becomes a score, the state of an online softmax, the gradient of a score.
//
// V is float for one row, or Vec for LANES rows, one in each lane.
// Calls left out of line cost the bfloat16 backward pass 3 %.
#define INLINE [[gnu::always_inline]] inline

namespace {

inline float larger(float a, float b) { return std::max(a, b); }
inline float tanh_of(float x) { return std::tanh(x); }
inline Vec tanh_of(const Vec& x) { return x.tanh(); }
inline float finite_or_zero(float x) { return x == -INF ? 0.f : x; }
inline Vec finite_or_zero(const Vec& x) { return select(x == Vec(-INF), x, Vec(0.f)); }

// exp(before − now), the factor of sums of weights when their row_max changes; in most tiles it does not.
inline float alpha_of(float before, float now) {
  return before == now ? 1.f : before == -INF ? 0.f : std::exp(before - now);
}
inline Vec alpha_of(const Vec& before, const Vec& now) { return (before - finite_or_zero(now)).exp(); }

// How a product z = q·k becomes a score: scale · z, then softcap · tanh(score / softcap) where softcap is not 0.
struct Scoring {
  float scale, softcap;

  // Whether row maxima of the products are those of the scores, so that `softmax_row` can apply the scale in the
  // argument of the exponential.
  bool scale_folds() const { return softcap == 0 && scale > 0; }

  template <typename V>
  V tanh(V z) const { return tanh_of(z * V(scale) / V(softcap)); }

  template <typename V>
  V score(V z) const { return softcap == 0 ? z * V(scale) : V(softcap) * tanh(z); }

  // Products z [width] become scores in place; z holds whole vectors.
  void apply(float* z, int64_t width) const {
    for (int64_t i = 0; i < width; i += LANES) score(Vec::loadu(z + i)).store(z + i);
  }
};

// The online softmax of a row.  Its weights are exp(score − row_max), row_sum is their sum, and the caller's
// accumulator holds the weighted sum of the values.
template <typename V>
struct RowState {
  V row_max{-INF}, row_sum{0.f};

  // A sink logit is a score without a value; −∞ is no sink.
  static RowState with_sink(float logit) { return {V(logit), V(logit == -INF ? 0.f : 1.f)}; }

  // What weights subtract: row_max, or 0 in an empty row, where −∞ − (−∞) would be NaN.
  V shift() const { return finite_or_zero(row_max); }

  // Raises row_max to that of a tile; returns alpha, by which row_sum and the accumulator must be multiplied.
  V raise(V tile_max) {
    const V before = row_max;
    row_max = larger(before, tile_max);
    return alpha_of(before, row_max);
  }

  // Adds the weights of the tile, once `raise` has been called for it.
  void add(V alpha, V tile_sum) { row_sum = row_sum * alpha + tile_sum; }

  // Adds the state of other keys of the same row; returns the factors of this accumulator and of the other one.
  std::pair<V, V> merge(const RowState& other) {
    const V alpha = raise(other.row_max), beta = alpha_of(other.row_max, row_max);
    add(alpha, other.row_sum * beta);
    return {alpha, beta};
  }

  bool empty() const { return row_max == -INF && row_sum == 0; }
  V inv_row_sum() const { return 1 / row_sum; }
  V lse() const { return row_max + std::log(row_sum); }
};

// acc [width] = alpha · acc + beta · more
INLINE void rescale_add(float* acc, float alpha, const float* more, float beta, int64_t width) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    (Vec::loadu(acc + i) * Vec(alpha) + Vec::loadu(more + i) * Vec(beta)).store(acc + i);
  for (; i < width; ++i) acc[i] = acc[i] * alpha + more[i] * beta;
}

// A tile of one row: z [width], −∞ where masked, becomes its weights p [width] = exp(scale · z − row_max), with the
// exponential of dtype E.  Returns alpha.  Both hold whole vectors, and may be the same.
template <typename E, typename T>
INLINE float softmax_row(RowState<float>& state, const float* z, T* p, int64_t width, float scale) {
  Vec tile_max(-INF), tile_sum(0.f);
  for (int64_t i = 0; i < width; i += LANES) tile_max = larger(tile_max, Vec::loadu(z + i));
  const float alpha = state.raise(max_of(tile_max) * scale);
  const Vec shift(state.shift());
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec weight = exponential(fmsub(Vec::loadu(z + i), Vec(scale), shift), E());
    tile_sum = tile_sum + weight;
    store(p + i, weight);
  }
  state.add(alpha, sum_of(tile_sum));
  return alpha;
}

// The weight p of the forward pass and the gradient dz of a product z.
struct ScoreGrad {
  Vec p, dz;
};

// dz = p · (dp − delta) · slope, where dp = d_out·v, delta = Σ d_out · out − d_lse, and slope is d score / d z.
// `masked` sets both to 0: where p is 0, dp may be infinite.  p comes from row_max and inv_row_sum, since lse loses
// digits: at 50 its rounding error is 2⁻¹⁹, and so would be that of every weight.
template <typename T, typename Mask>
INLINE ScoreGrad score_grad(Scoring scoring, Vec z, Vec dp, Vec row_max, Vec inv_row_sum, Vec delta, Mask masked) {
  Vec above = fmsub(z, Vec(scoring.scale), row_max), slope(scoring.scale);
  if (scoring.softcap != 0) {
    const Vec t = scoring.tanh(z);
    above = Vec(scoring.softcap) * t - row_max;
    slope = slope * (Vec(1.f) - t * t);
  }
  const Vec p = masked(exponential(above, T()) * inv_row_sum);
  return {p, masked(p * (dp - delta) * slope)};
}

}  // namespace
