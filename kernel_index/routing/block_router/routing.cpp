// The best blocks of every query by the blocks' means: 64 blocks are scored at a time, and no score is kept.
namespace {

constexpr int64_t QUERIES = 64, BLOCKS = 64;  // of a tile of scores

struct Router {
  int64_t B, T, H, K, G, D, blocks, topk, legal_rows, threads;
  const int32_t *first, *current;  // [legal_rows, T]: the blocks first ≤ j < current are routable, current is selected
};

template <typename T>
void route(const Router& c, const T* q, const float* means, int32_t* indices) {
  const int64_t tiles = (c.blocks + BLOCKS - 1) / BLOCKS, heads = c.H / c.G, chunks = (c.T + QUERIES - 1) / QUERIES;
  Buffer<float> packed(c.B * c.K * tiles * BLOCKS * c.D);  // [B, K, tiles] of [D, BLOCKS]
  pack_blocks(means, packed.at(0), c.B, c.blocks, c.K, c.D, BLOCKS, BLOCKS, true, c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<float> query(QUERIES * c.D), z(QUERIES * BLOCKS);  // [QUERIES, D], [QUERIES, BLOCKS]
    std::vector<TopScores> best(QUERIES);
    std::vector<int64_t> selected;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.G * chunks; ++unit) {
      // The last queries have the most routable blocks: they come first, so that threads end together.
      const int64_t b = unit % c.B, g = unit / c.B % c.G, begin = (chunks - 1 - unit / c.B / c.G) * QUERIES;
      const int64_t count = std::min(QUERIES, c.T - begin), h = g * c.K / c.G;
      const int32_t* first = c.first + (c.legal_rows > 1 ? b * c.T : 0) + begin;
      const int32_t* current = c.current + (c.legal_rows > 1 ? b * c.T : 0) + begin;
      int64_t low = c.blocks, high = 0;
      std::fill_n(query.at(0), QUERIES * c.D, 0.f);
      for (int64_t r = 0; r < count; ++r) {
        low = std::min<int64_t>(low, first[r]);
        high = std::max<int64_t>(high, std::min<int64_t>(current[r], c.blocks));
        const T* from = q + ((b * c.T + begin + r) * c.H + g * heads) * c.D;
        for (int64_t i = 0; i < heads; ++i)
          for (int64_t d = 0; d < c.D; ++d) query.at(r * c.D)[d] += from[i * c.D + d];
        for (int64_t d = 0; d < c.D; ++d) query.at(r * c.D)[d] /= heads;
        best[r].begin(c.topk - (current[r] >= 0 && current[r] < c.blocks));
      }
      for (int64_t tile = low / BLOCKS; tile * BLOCKS < high; ++tile) {
        product(QUERIES, BLOCKS, c.D, query.at(0), packed.at(((b * c.K + h) * tiles + tile) * BLOCKS * c.D), z.at(0));
        for (int64_t r = 0; r < count; ++r)
          best[r].scan(z.at(r * BLOCKS), std::max<int64_t>(first[r] - tile * BLOCKS, 0),
                       std::min<int64_t>({current[r] - tile * BLOCKS, c.blocks - tile * BLOCKS, BLOCKS}),
                       tile * BLOCKS);
      }
      for (int64_t r = 0; r < count; ++r) {
        best[r].cut();
        selected.clear();
        for (const int64_t key : best[r].keys) selected.push_back(index_of(key));
        if (current[r] >= 0 && current[r] < c.blocks) selected.push_back(current[r]);
        std::sort(selected.begin(), selected.end());
        selected.resize(c.topk, -1);
        std::copy(selected.begin(), selected.end(), indices + ((b * c.T + begin + r) * c.G + g) * c.topk);
      }
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                             \
  void route_##NAME(const int64_t* n, const int32_t* first, const int32_t* current, const T* q, const float* means, \
                    int32_t* indices) {                                                                             \
    route<T>({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], first, current}, q, means, indices);      \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
