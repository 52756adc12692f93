// Key blocks in two steps: every legal block is scored, the groups whose blocks have the best mean score are opened,
// and the best blocks inside them are selected.
namespace {

constexpr int64_t QUERIES = 64, BLOCKS = 64;  // of a tile of scores
constexpr int64_t FEW = 16;  // up to this many queries, packing the blocks for products takes longer than dot products

struct Search {
  int64_t B, T, K, D, blocks, ratio, topc, topk, legal_rows, current_in, sink_in, local_in, threads;
  const int32_t *first, *current;  // [legal_rows, T]: the blocks first ≤ j < current are legal
};

struct Row {
  TopScores groups, best;
  std::vector<int64_t> selected;

  // The selected blocks of one query; its scores z [blocks] are valid where a block is legal.
  void choose(const Search& c, const float* z, int64_t first, int64_t current, int32_t* to) {
    const bool some = first < current;
    selected.clear();
    if (c.current_in && current >= 0 && current < c.blocks) selected.push_back(current);
    if (c.sink_in && some) selected.push_back(first);
    if (c.local_in && some && !(c.sink_in && first == current - 1)) selected.push_back(current - 1);
    best.begin(c.topk - selected.size());
    // Forced blocks are the first and the last of the range, so the candidates are a narrower range.
    if (some) scan_groups(c, z, first, current, first + (c.sink_in != 0), current - (c.local_in != 0));
    best.cut();
    for (const int64_t key : best.keys) selected.push_back(index_of(key));
    std::sort(selected.begin(), selected.end());
    selected.resize(c.topk, -1);
    std::copy(selected.begin(), selected.end(), to);
  }

  void scan_groups(const Search& c, const float* z, int64_t first, int64_t current, int64_t low, int64_t high) {
    const int64_t begin = first / c.ratio, end = (current - 1) / c.ratio + 1;
    if (end - begin <= c.topc) return best.scan(z, low, high, 0);
    groups.begin(c.topc);
    for (int64_t m = begin; m < end; ++m) {  // the groups at the ends average their legal blocks only
      const int64_t from = std::max(first, m * c.ratio), to = std::min(current, (m + 1) * c.ratio);
      float sum = 0;
      for (int64_t j = from; j < to; ++j) sum += z[j];
      groups.offer(sum / (to - from), m);
    }
    groups.cut();
    // By ascending group, so that blocks are offered by ascending index.
    std::sort(groups.keys.begin(), groups.keys.end(), [](int64_t a, int64_t b) { return index_of(a) < index_of(b); });
    for (const int64_t key : groups.keys) {
      const int64_t m = index_of(key);
      best.scan(z, std::max(low, m * c.ratio), std::min(high, (m + 1) * c.ratio), 0);
    }
  }
};

void search(const Search& c, const float* q, const float* keys, int32_t* indices) {
  const bool few = c.T <= FEW;
  const int64_t tiles = (c.blocks + BLOCKS - 1) / BLOCKS, z_width = tiles * BLOCKS, width = round_up(c.D, LANES);
  const int64_t chunks = (c.T + QUERIES - 1) / QUERIES, panel = BLOCKS * c.D;
  Buffer<float> packed(few ? 0 : c.B * c.K * tiles * panel);  // [B, K, tiles] of [D, BLOCKS]
  if (!few) pack_blocks(keys, packed.at(0), c.B, c.blocks, c.K, c.D, BLOCKS, BLOCKS, true, c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<float> query(QUERIES * width), z(QUERIES * z_width);  // [QUERIES, width], [QUERIES, z_width]
    Row row;
    std::fill_n(query.at(0), QUERIES * width, 0.f);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.K * chunks; ++unit) {
      // The last queries have the most legal blocks: they come first, so that threads end together.
      const int64_t b = unit % c.B, h = unit / c.B % c.K, begin = (chunks - 1 - unit / c.B / c.K) * QUERIES;
      const int64_t count = std::min(QUERIES, c.T - begin);
      const int32_t* first = c.first + (c.legal_rows > 1 ? b * c.T : 0) + begin;
      const int32_t* current = c.current + (c.legal_rows > 1 ? b * c.T : 0) + begin;
      int64_t low = c.blocks, high = 0;
      for (int64_t r = 0; r < count; ++r) {
        std::copy_n(q + ((b * c.T + begin + r) * c.K + h) * c.D, c.D, query.at(r * width));
        low = std::min<int64_t>(low, first[r]);
        high = std::max<int64_t>(high, current[r]);
        if (few)
          for (int64_t j = first[r]; j < current[r]; ++j)
            z.at(r * z_width)[j] = dot(query.at(r * width), keys + ((b * c.blocks + j) * c.K + h) * c.D, c.D);
      }
      for (int64_t tile = few ? tiles : low / BLOCKS; tile * BLOCKS < high; ++tile)
        product(QUERIES, BLOCKS, c.D, query.at(0), packed.at(((b * c.K + h) * tiles + tile) * panel),
                z.at(tile * BLOCKS), false, width, z_width);
      for (int64_t r = 0; r < count; ++r)
        row.choose(c, z.at(r * z_width), first[r], current[r], indices + ((b * c.T + begin + r) * c.K + h) * c.topk);
    }
  }
}

}  // namespace

extern "C" void search(const int64_t* n, const int32_t* first, const int32_t* current, const float* q,
                       const float* keys, int32_t* indices) {
  search({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], first, current}, q, keys,
         indices);
}
