// The best keys of every query by the indexer's score, Σ_j w_j · relu(q_j · k): scores exist one tile at a time.
namespace {

constexpr int64_t QUERIES = 64, KEYS = 128;  // of a tile
constexpr int64_t FEW = 16;                  // up to this many queries, packing the keys takes longer than dot products
constexpr int64_t SPLIT_KEYS = 1024;         // keys of a unit of work where queries are few

struct Index {
  int64_t B, T, S, J, D, topk, rows, threads;
  const int32_t *starts, *ends;

  int64_t bound(const int32_t* of, int64_t b, int64_t t) const {
    return std::clamp<int64_t>(of[(rows > 1 ? b * T : 0) + t], 0, S);
  }
};

void write(TopScores& best, int64_t topk, int64_t* indices, float* scores) {
  best.cut();
  std::sort(best.keys.begin(), best.keys.end(), std::greater<>());
  const int64_t n = best.keys.size();
  std::transform(best.keys.begin(), best.keys.end(), indices, index_of);
  std::transform(best.keys.begin(), best.keys.end(), scores, score_of);
  std::fill(indices + n, indices + topk, -1);
  std::fill(scores + n, scores + topk, -INF);
}

void few_queries(const Index& c, const float* q, const float* k, const float* w, int64_t* indices, float* scores) {
  const int64_t width = round_up(c.D, LANES), z_width = round_up(c.S, LANES);
  const int64_t splits = (c.S + SPLIT_KEYS - 1) / SPLIT_KEYS;
  Buffer<float> z(c.B * c.T * z_width), query(c.B * c.T * c.J * width);  // [B, T, z_width], [B, T, J, width]
  for (int64_t i = 0; i < c.B * c.T * c.J; ++i) {
    std::fill_n(query.at(i * width), width, 0.f);
    std::copy_n(q + i * c.D, c.D, query.at(i * width));
  }
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.T * splits; ++unit) {
      const int64_t i = unit / splits, b = i / c.T, t = i % c.T, from = unit % splits * SPLIT_KEYS;
      const int64_t low = std::max(from, c.bound(c.starts, b, t));
      const int64_t high = std::min(from + SPLIT_KEYS, c.bound(c.ends, b, t));
      for (int64_t s = low; s < high; ++s) {
        float sum = 0;
        for (int64_t j = 0; j < c.J; ++j) {
          const float x = dot(query.at((i * c.J + j) * width), k + (b * c.S + s) * c.D, c.D);
          sum += w[i * c.J + j] * (x < 0 ? 0 : x);  // NaN stays
        }
        z.at(i * z_width)[s] = sum;
      }
    }
    TopScores best;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < c.B * c.T; ++i) {
      best.begin(std::min(c.topk, c.S));
      best.scan(z.at(i * z_width), c.bound(c.starts, i / c.T, i % c.T), c.bound(c.ends, i / c.T, i % c.T), 0);
      write(best, c.topk, indices + i * c.topk, scores + i * c.topk);
    }
  }
}

void many_queries(const Index& c, const float* q, const float* k, const float* w, int64_t* indices, float* scores) {
  const int64_t chunks = (c.T + QUERIES - 1) / QUERIES, tiles = (c.S + KEYS - 1) / KEYS, panel = KEYS * c.D;
  Buffer<float> packed(c.B * tiles * panel);  // [B, tiles] of [D, KEYS]
  pack_blocks(k, packed.at(0), c.B, c.S, 1, c.D, KEYS, KEYS, true, c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<float> query(QUERIES * c.J * c.D), z(QUERIES * KEYS), sum(QUERIES * KEYS);  // z, sum: [QUERIES, KEYS]
    std::vector<TopScores> best(QUERIES);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * chunks; ++unit) {
      // The last queries see the most keys: they come first, so that threads end together.
      const int64_t b = unit % c.B, begin = (chunks - 1 - unit / c.B) * QUERIES, count = std::min(QUERIES, c.T - begin);
      std::fill_n(query.at(0), QUERIES * c.J * c.D, 0.f);
      std::copy_n(q + (b * c.T + begin) * c.J * c.D, count * c.J * c.D, query.at(0));
      int64_t low = c.S, high = 0;
      for (int64_t r = 0; r < count; ++r) {
        low = std::min(low, c.bound(c.starts, b, begin + r));
        high = std::max(high, c.bound(c.ends, b, begin + r));
        best[r].begin(std::min(c.topk, c.S));
      }
      for (int64_t tile = low / KEYS; tile * KEYS < high; ++tile) {
        std::fill_n(sum.at(0), QUERIES * KEYS, 0.f);
        for (int64_t j = 0; j < c.J; ++j) {
          product(QUERIES, KEYS, c.D, query.at(j * c.D), packed.at((b * tiles + tile) * panel), z.at(0), false,
                  c.J * c.D);
          for (int64_t r = 0; r < count; ++r) {
            const Vec weight(w[(b * c.T + begin + r) * c.J + j]);
            for (float *x = z.at(r * KEYS), *y = sum.at(r * KEYS); x < z.at((r + 1) * KEYS); x += LANES, y += LANES)
              fmadd(weight, positive(Vec::loadu(x)), Vec::loadu(y)).store(y);
          }
        }
        for (int64_t r = 0; r < count; ++r)
          best[r].scan(sum.at(r * KEYS), std::max<int64_t>(c.bound(c.starts, b, begin + r) - tile * KEYS, 0),
                       std::min(c.bound(c.ends, b, begin + r) - tile * KEYS, KEYS), tile * KEYS);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (b * c.T + begin + r) * c.topk;
        write(best[r], c.topk, indices + at, scores + at);
      }
    }
  }
}

}  // namespace

extern "C" void index_keys(const int64_t* n, const int32_t* starts, const int32_t* ends, const float* q, const float* k,
                           const float* w, int64_t* indices, float* scores) {
  const Index c{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], starts, ends};
  (c.T <= FEW ? few_queries : many_queries)(c, q, k, w, indices, scores);
}
