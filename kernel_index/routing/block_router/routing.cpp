// The best blocks of every query by their means: scores of 64 blocks at a time, of which none is kept.
namespace {

constexpr int64_t QUERIES = 64;  // of a unit, and blocks of a product

struct Router {
  int64_t B, T, H, K, G, D, blocks, topk, legal_rows, threads;
  const int32_t *first, *current;
};

// The best keys of a row so far, the best first.
struct Best {
  std::vector<int64_t> keys;
  int64_t most;
  float least = -INF;  // a score must be above it once `most` are kept

  void offer(float score, int64_t j) {
    const int64_t key = key_of(score, j);
    if (int64_t(keys.size()) == most) {
      if (most == 0 || key < keys.back()) return;
      keys.pop_back();
    }
    keys.insert(std::upper_bound(keys.begin(), keys.end(), key, std::greater<>()), key);
    if (int64_t(keys.size()) == most) least = score_of(keys.back());
  }

  void scan(const float* z, int64_t low, int64_t high, int64_t first_block) {
    for (int64_t i = low / LANES * LANES; i < high; i += LANES) {
      // Blocks come in ascending order, so a score that only equals the least one has the larger index and loses.
      const bool all_below = (Vec::loadu(z + i) <= Vec(least)).zero_mask() == 0;
      if (all_below && int64_t(keys.size()) == most) continue;
      for (int64_t x = std::max(i, low); x < std::min(i + LANES, high); ++x) offer(z[x], first_block + x);
    }
  }
};

template <typename T>
void route(const Router& c, const T* q, const float* means, int32_t* indices) {
  const int64_t tiles = (c.blocks + QUERIES - 1) / QUERIES, heads = c.H / c.G, chunks = (c.T + QUERIES - 1) / QUERIES;
  Buffer<float> across(c.B * c.K * tiles * QUERIES * c.D);
  pack_blocks(means, across.at(0), c.B, c.blocks, c.K, c.D, QUERIES, QUERIES, true, c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<float> query(QUERIES * c.D), z(QUERIES * QUERIES);
    std::vector<Best> best(QUERIES);
    std::vector<int64_t> picked;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.G * chunks; ++unit) {
      // The last queries have the most blocks behind them: begin with them, so that threads end together.
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
        best[r].keys.clear();
        best[r].least = -INF;
        best[r].most = c.topk - (current[r] >= 0 && current[r] < c.blocks);
      }
      for (int64_t tile = low / QUERIES; tile * QUERIES < high; ++tile) {
        product(QUERIES, QUERIES, c.D, query.at(0), across.at(((b * c.K + h) * tiles + tile) * QUERIES * c.D), z.at(0));
        for (int64_t r = 0; r < count; ++r)
          best[r].scan(z.at(r * QUERIES), std::max<int64_t>(first[r] - tile * QUERIES, 0),
                       std::min<int64_t>({current[r] - tile * QUERIES, c.blocks - tile * QUERIES, QUERIES}),
                       tile * QUERIES);
      }
      for (int64_t r = 0; r < count; ++r) {
        picked.clear();
        for (const int64_t key : best[r].keys) picked.push_back(block_of(key));
        if (current[r] >= 0 && current[r] < c.blocks) picked.push_back(current[r]);
        std::sort(picked.begin(), picked.end());
        picked.resize(c.topk, -1);
        std::copy(picked.begin(), picked.end(), indices + ((b * c.T + begin + r) * c.G + g) * c.topk);
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
