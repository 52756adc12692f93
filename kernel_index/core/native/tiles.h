// A tile of queries: its scores are transposed, [keys, W], so a vector is one key's scores of LANES queries.
//
// `softmax_row` of attention.h reduces along a row and so cannot be used; the row state and the score gradient are the
// same code with V = Vec.  C is a source's call with its `scoring` and sizes T and H.  A Tile has its WIDTH, `b`, `first`
// and `count`, the bounds `start` and `end` of its queries, and `q_end` or null.  A Span has the `size()` of a block of
// keys, `first` among all keys, and `whole` where every query of the tile sees all of them.
namespace {

constexpr int64_t TILE = 64;  // queries of a tile in a backward pass

// A tile's rows of x [B, T, H, W] as right operands: `transposed` [W, QUERIES] and, where it is given, `rows`
// [QUERIES, W].
template <typename T, typename C, typename Tile>
void pack_rows(const T* x, const C& c, const Tile& t, int64_t h, int64_t W, T* transposed, T* rows = nullptr) {
  constexpr int64_t QUERIES = Tile::WIDTH;
  for (int64_t r = 0; r < QUERIES; ++r) {
    const T* from = x + ((t.b * c.T + t.first + r) * c.H + h) * W;
    for (int64_t d = 0; d < W; ++d) {
      const T value = r < t.count ? from[d] : T(0);
      transposed[packed_at<T>(d, r, QUERIES)] = value;
      if (rows) rows[packed_at<T>(r, d, W)] = value;
    }
  }
}

// `transposed` [W, QUERIES] of float32 into a tile's rows of x [B, T, H, W], each times its factor.
template <typename T, typename C, typename Tile>
void unpack_rows(const float* transposed, const float* factor, const C& c, const Tile& t, int64_t h, int64_t W, T* x) {
  constexpr int64_t QUERIES = Tile::WIDTH;
  for (int64_t r = 0; r < t.count; ++r) {
    T* to = x + ((t.b * c.T + t.first + r) * c.H + h) * W;
    for (int64_t d = 0; d < W; ++d) to[d] = T(transposed[d * QUERIES + r] * factor[r]);
  }
}

// Stores the weights of two keys into a right operand [keys, QUERIES]: bfloat16 is multiplied in pairs of rows.
template <int64_t QUERIES>
inline void store_pair(float* to, int64_t i, Vec even, Vec odd) {
  even.store(to + i), odd.store(to + QUERIES + i);
}
template <int64_t>
inline void store_pair(BFloat16* to, int64_t i, Vec even, Vec odd) {
  const auto [first, second] = interleave(even, odd);
  store(to + 2 * i, first), store(to + 2 * i + LANES, second);
}

// The lanes of the queries i … for which a tile hides key s beside its bounds; a source has its own for its Tile.
template <typename Tile>
inline uint16_t hidden_by(const Tile&, int64_t, int64_t) {
  return 0;
}

// x, or `value` in the lanes of the queries i … that do not see key s.
template <typename Tile>
inline Vec masked(Vec x, const Tile& t, int64_t i, int64_t s, float value) {
  Lanes hidden = outside(s, t.start + i, t.end + i);
  if (t.q_end) hidden = hidden | lanes_from(t.q_end[s] - static_cast<int32_t>(t.first + i));
  return select(hidden | lanes_of(hidden_by(t, i, s)), x, Vec(value));
}

// The products z [keys, QUERIES] of a block become weights p, a right operand, and update the rows' states.  `alpha`
// holds the rows' factors for the accumulator; returns whether any of them is not 1.
template <typename T, typename C, typename Tile, typename Span>
bool online_softmax(const C& c, const Tile& t, const Span& span, float* z, T* p, float* row_max, float* row_sum,
                    float* alpha) {
  constexpr int64_t QUERIES = Tile::WIDTH;
  const bool folds = c.scoring.scale_folds();
  if (!folds) c.scoring.apply(z, span.size() * QUERIES);
  const Vec scale(folds ? c.scoring.scale : 1.f);
  bool grew = false;
  for (int64_t i = 0; i < QUERIES; i += LANES) {
    Vec tile_max(-INF), tile_sum(0.f);
    for (int64_t n = 0; n < span.size(); ++n) {
      Vec x = Vec::loadu(z + n * QUERIES + i);
      if (!span.whole) (x = masked(x, t, i, span.first + n, -INF)).store(z + n * QUERIES + i);
      tile_max = larger(tile_max, x);
    }
    RowState<Vec> state{Vec::loadu(row_max + i), Vec::loadu(row_sum + i)};
    const Vec before = state.row_max, factor = state.raise(tile_max * scale), shift = state.shift();
    for (int64_t n = 0; n < span.size(); n += 2) {
      const Vec even = exponential(fmsub(Vec::loadu(z + n * QUERIES + i), scale, shift), T());
      const Vec odd = exponential(fmsub(Vec::loadu(z + (n + 1) * QUERIES + i), scale, shift), T());
      tile_sum = tile_sum + (even + odd);
      store_pair<QUERIES>(p + n * QUERIES, i, even, odd);
    }
    state.add(factor, tile_sum);
    grew |= !every(state.row_max == before);
    state.row_max.store(row_max + i);
    state.row_sum.store(row_sum + i);
    factor.store(alpha + i);
  }
  return grew;
}

// The operands of a tile of queries in the backward pass, and its accumulator of d_q.
template <typename T>
struct QueryTile {
  static constexpr int64_t QUERIES = TILE;
  Buffer<T> q_transposed, q, d_out_transposed, d_out;  // [D, QUERIES], [QUERIES, D], [Dv, QUERIES], [QUERIES, Dv]
  Buffer<float> d_q;                                   // [D, QUERIES]
  alignas(64) float row_max[QUERIES], inv_row_sum[QUERIES], delta[QUERIES];
  template <typename C>
  explicit QueryTile(const C& c)
      : q_transposed(c.D * QUERIES), q(c.D * QUERIES), d_out_transposed(c.Dv * QUERIES), d_out(c.Dv * QUERIES),
        d_q(c.D * QUERIES) {}

  template <typename C, typename Tile>
  void load(const C& c, const Tile& t, int64_t h, const T* all_q, const T* all_d_out, const float* row_maxes,
            const float* inv_row_sums, const float* deltas) {
    pack_rows(all_q, c, t, h, c.D, q_transposed.at(0), q.at(0));
    pack_rows(all_d_out, c, t, h, c.Dv, d_out_transposed.at(0), d_out.at(0));
    std::fill_n(d_q.at(0), c.D * QUERIES, 0.f);
    for (int64_t r = 0; r < QUERIES; ++r) {
      const int64_t at = (t.b * c.H + h) * c.T + t.first + r;
      const bool exists = r < t.count;
      row_max[r] = exists ? row_maxes[at] : 0.f, inv_row_sum[r] = exists ? inv_row_sums[at] : 0.f;
      delta[r] = exists ? deltas[at] : 0.f;
    }
  }
};

// The products z and dp [keys, QUERIES] of a block become weights p and gradients d_z, left operands [keys, QUERIES];
// d_z_pairs is d_z as a right operand of bfloat16.  All are 0 where a query does not see a key.
template <typename T, typename C, typename Tile, typename Span>
void score_grads(const C& c, const Tile& t, const QueryTile<T>& x, const Span& span, const float* z, const float* dp,
                 T* p, T* d_z, T* d_z_pairs) {
  constexpr int64_t QUERIES = Tile::WIDTH;
  for (int64_t i = 0; i < QUERIES; i += LANES) {
    const Vec row_max = Vec::loadu(x.row_max + i), inv_row_sum = Vec::loadu(x.inv_row_sum + i);
    const Vec delta = Vec::loadu(x.delta + i);
    const auto of_key = [&](int64_t n) {
      const int64_t at = n * QUERIES + i;
      const ScoreGrad grad =
          score_grad<T>(c.scoring, Vec::loadu(z + at), Vec::loadu(dp + at), row_max, inv_row_sum, delta, [&](Vec x) {
            return span.whole ? x : masked(x, t, i, span.first + n, 0.f);
          });
      store(p + at, grad.p);
      store(d_z + at, grad.dz);
      return grad.dz;
    };
    for (int64_t n = 0; n < span.size(); n += 2) {
      const Vec even = of_key(n), odd = of_key(n + 1);
      if constexpr (std::is_same_v<T, BFloat16>) store_pair<QUERIES>(d_z_pairs + n * QUERIES, i, even, odd);
    }
  }
}

}  // namespace
