// A decoding step of MoBA: score the blocks' means, select the best blocks, attend to their keys in the cache.
namespace {

struct Blocks {
  int64_t size, topk, mean_stride, means, left;  // means [B, ≥ means, K, D]; left < 0: no window
};

// The selected blocks of a query, ascending: its current block, and the best of those before it from `first` on.
void select(const Step& c, const Blocks& blocks, const float* means, const float* mean_query, int64_t h, int64_t first,
            int64_t current, TopScores& best, std::vector<int64_t>& selected) {
  best.begin(blocks.topk - 1);
  for (int64_t j = first; j < std::min(current, blocks.means); ++j)
    best.offer(dot(mean_query, means + (j * c.K + h) * c.D, c.D), j);
  best.cut();
  selected.clear();
  for (const int64_t key : best.keys) selected.push_back(index_of(key));
  std::sort(selected.begin(), selected.end());
  selected.push_back(current);
}

template <typename T>
void decode(const Step& c, const Blocks& blocks, const T* q, const T* k, const T* v, const float* means, const float* sink,
            T* out) {
  const int64_t heads = c.heads(), splits = (blocks.topk * blocks.size + SPLIT - 1) / SPLIT;
#pragma omp parallel num_threads(c.threads)
  {
    SlotAttention<T> attention(c);
    std::vector<float> mean(attention.width);
    std::vector<int64_t> selected, offsets;
    TopScores best;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.L * c.G; ++unit) {
      const int64_t g = unit % c.G, t = unit / c.G % c.L, b = unit / c.G / c.L, h = c.kv_head(g);
      const int64_t row = (b * c.L + t) * c.H + g * heads, own = c.position(b, t);
      Partials partials(heads, splits, c.D);
      offsets.clear();
      if (own >= 0) {
        attention.load_queries(q + row * c.D);
        std::fill(mean.begin(), mean.end(), 0.f);
        for (int64_t i = 0; i < heads; ++i)
          for (int64_t d = 0; d < c.D; ++d) mean[d] += attention.query[i * attention.width + d];
        for (int64_t d = 0; d < c.D; ++d) mean[d] /= heads;
        const int64_t start = blocks.left < 0 ? 0 : std::max<int64_t>(0, own - blocks.left);
        select(c, blocks, means + b * blocks.mean_stride, mean.data(), h, start / blocks.size, own / blocks.size, best,
               selected);
        for (const int64_t j : selected)
          for (int64_t s = std::max(start, j * blocks.size); s <= std::min(own, (j + 1) * blocks.size - 1); ++s)
            offsets.push_back(c.offset(b, s, h));
      }
      for (int64_t x = 0, n = offsets.size(); x < n; x += SPLIT)
        attention.attend(k, v, &offsets[x], std::min(SPLIT, n - x), partials, 0, x / SPLIT);
      for (int64_t i = 0; i < heads; ++i) partials.finish(i, out + (row + i) * c.D, sink[g * heads + i]);
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
  void moba_decode_##NAME(const int64_t* n, float scale, float softcap, const int32_t* lengths, const int32_t* table, \
                          const T* q, const T* k, const T* v, const float* means, const float* sink, T* out) {        \
    const Step c{n[0], n[1], n[2], n[3], n[4], n[5], n[8], n[9], n[12], n[14], {scale, softcap}, lengths, table};     \
    decode<T>(c, {n[6], n[7], n[10], n[11], n[13]}, q, k, v, means, sink, out);                                             \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
