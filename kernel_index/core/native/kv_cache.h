// A decoding step: the queries of one KV head attend to a list of slots of the KV cache, which are read in place.
namespace {

constexpr int64_t SPLIT = 256;  // slots of a split; fixed, so that results do not depend on the number of threads
constexpr int64_t AHEAD = 8;    // slots between the one that is read and the one that is prefetched

// The slot of token s of row b: the table names the row's pages; without one the row's slots are consecutive.
inline int64_t slot_of(const int32_t* table, int64_t table_width, int64_t page, int64_t b, int64_t s) {
  return table_width ? table[b * table_width + s / page] * page + s % page : b * page + s;
}

struct Step {
  int64_t B, L, H, K, G, D, page, table_width, added, threads;  // H / G query heads share a list of slots
  Scoring scoring;
  const int32_t *lengths, *table;

  int64_t heads() const { return H / G; }
  int64_t kv_head(int64_t g) const { return g * K / G; }
  // Where keys and values of token s begin in the cache [slots, K, D], counted in elements.
  int64_t offset(int64_t b, int64_t s, int64_t h) const {
    return (slot_of(table, table_width, page, b, s) * K + h) * D;
  }
  int64_t total(int64_t b) const { return lengths[b] + added; }
  int64_t position(int64_t b, int64_t t) const { return total(b) - L + t; }  // the last query is at the last key
};

// Softmax states [rows, splits] with accumulators [rows, splits, D], which are not divided by row_sum.
struct Partials {
  int64_t splits, D;
  std::vector<RowState<float>> states;
  Buffer<float> acc;

  Partials(int64_t rows, int64_t splits, int64_t D)
      : splits(splits), D(D), states(rows * splits), acc(rows * splits * D) {}

  // Merges the splits of a row, in their order, and a sink logit (−∞ for none) into its output [D]; a row without keys
  // is 0.
  template <typename T>
  void finish(int64_t row, T* out, float sink = -INF) const {
    const RowState<float>* of = states.data() + row * splits;
    RowState<float> all;
    for (int64_t i = 0; i < splits; ++i) all.row_max = larger(all.row_max, of[i].row_max);  // then no alpha is below 1
    std::vector<float> sum(D, 0.f);
    for (int64_t i = 0; i < splits; ++i) {
      if (of[i].row_sum == 0) continue;
      const auto [alpha, beta] = all.merge(of[i]);
      rescale_add(sum.data(), alpha, acc.at((row * splits + i) * D), beta, D);
    }
    const bool empty = all.empty();
    const float alpha = all.merge(RowState<float>::with_sink(sink)).first;
    for (int64_t d = 0; d < D; ++d) out[d] = T(empty ? 0.f : sum[d] * alpha / all.row_sum);
  }
};

// The query heads that share a list of slots, and the scores of one split; one object for each thread.
template <typename T>
struct SlotAttention {
  const Step& c;
  const int64_t heads, width;
  std::vector<float> query, z;  // [heads, width], [heads, SPLIT]

  explicit SlotAttention(const Step& c)
      : c(c), heads(c.heads()), width(round_up(c.D, LANES)), query(heads * width), z(heads * SPLIT) {}

  void load_queries(const T* q) {  // [heads, D]
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t d = 0; d < c.D; ++d) query[i * width + d] = q[i * c.D + d];
  }

  void prefetch(const T* row) const {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < c.D * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
  }

  // Attends to a split of n ≤ SPLIT slots, given by their offsets, for the rows [row, row + heads).
  void attend(const T* k, const T* v, const int64_t* offsets, int64_t n, Partials& to, int64_t row, int64_t split) {
    if (n == 0) return;
    for (int64_t x = 0; x < n; ++x) {
      prefetch(k + offsets[std::min(x + AHEAD, n - 1)]);
      for (int64_t i = 0; i < heads; ++i) z[i * SPLIT + x] = dot(&query[i * width], k + offsets[x], c.D);
    }
    for (int64_t i = 0; i < heads; ++i) {
      float* row_z = &z[i * SPLIT];
      if (c.scoring.softcap == 0)
        c.scoring.apply(row_z, round_up(n, LANES));
      else  // by elements: std::tanh
        for (int64_t x = 0; x < n; ++x) row_z[x] = c.scoring.score(row_z[x]);
      std::fill(row_z + n, row_z + round_up(n, LANES), -INF);
      RowState<float>& state = to.states[(row + i) * to.splits + split];
      softmax_row<float>(state, row_z, row_z, round_up(n, LANES), 1.f);
      // If all scores overflow to −∞, the split has weight 0 beside others; alone it is NaN, as in torch.softmax.
      if (state.empty()) state.row_max = std::numeric_limits<float>::lowest();
    }
    for (int64_t d = 0; d < c.D; d += LANES)
      for (int64_t i = 0; i < heads; ++i) {
        const float* p = &z[i * SPLIT];
        Vec even(0.f), odd(0.f);  // two chains of additions, since each waits for the one before it
        for (int64_t x = 0; x + 1 < n; x += 2) {
          even = fmadd(Vec(p[x]), load(v + offsets[x] + d, c.D - d), even);
          odd = fmadd(Vec(p[x + 1]), load(v + offsets[x + 1] + d, c.D - d), odd);
        }
        if (n % 2) even = fmadd(Vec(p[n - 1]), load(v + offsets[n - 1] + d, c.D - d), even);
        (even + odd).store(to.acc.at(((row + i) * to.splits + split) * c.D + d), std::min(c.D - d, LANES));
      }
  }
};

}  // namespace
