// Attention under a mask of intervals: see native.py.
//
// Tiles of scores are transposed, [keys, QUERIES]: a vector is one key's scores of LANES queries.  Row maxima, row
// sums, bounds and gradients are vectors too, nothing is reduced across lanes, and the five products of the backward
// pass take their operands without another transposition: see tiles.h.
namespace {

constexpr int64_t QUERIES = TILE;
constexpr int64_t KEYS = 128;    // of a block at most: two tiles of scores and a block's operands fit the L2 cache
// The number of keys of a product is a multiple of it, so that sums have one order: AMX adds up 32 bfloat16 terms at once,
// and of 112 keys oneDNN makes four parts of 28.
constexpr int64_t ALIGN = 32;
constexpr int64_t TILES = 8;     // of a chunk of the backward pass, over all query heads of a KV head

struct Call {
  int64_t B, T, S, H, K, D, Dv, bounds_rows, threads;
  Scoring scoring;
  const int32_t *start, *end;  // [bounds_rows, T]: query t sees the keys start ≤ s < end
  const int32_t *q_end;        // [bounds_rows, S] in a tree: key s is seen by queries t < q_end; else null

  int64_t block() const { return std::min(KEYS, round_up(std::max<int64_t>(S, 1), ALIGN)); }  // keys of a block
  int64_t blocks() const { return (S + block() - 1) / block(); }
  int64_t tiles() const { return (T + QUERIES - 1) / QUERIES; }
  int64_t heads() const { return H / K; }  // query heads of a KV head
};

// In a tree: where the queries of each key end, and the least and the greatest end of a block's keys.
struct Paths {
  std::vector<int32_t> q_end, low, high;  // [bounds_rows, blocks * block], [bounds_rows, blocks]

  explicit Paths(const Call& c) {
    if (!c.q_end) return;
    const int64_t size = c.blocks() * c.block();
    q_end.assign(c.bounds_rows * size, 0);
    for (int64_t row = 0; row < c.bounds_rows; ++row)
      std::copy_n(c.q_end + row * c.S, c.S, q_end.begin() + row * size);
    for (auto from = q_end.begin(); from != q_end.end(); from += c.block()) {
      const auto [least, greatest] = std::minmax_element(from, from + c.block());
      low.push_back(*least), high.push_back(*greatest);
    }
  }
};

// The queries of a tile and their bounds; queries past the last see no key.
struct Tile {
  static constexpr int64_t WIDTH = QUERIES;
  int64_t b, first, count;
  int64_t low, high, all_from, all_to;  // some query sees the keys [low, high), every query sees [all_from, all_to)
  alignas(64) int32_t start[QUERIES], end[QUERIES];
  const int32_t *q_end = nullptr, *block_low = nullptr, *block_high = nullptr;  // of the row's keys and blocks, in a tree

  Tile(const Call& c, const Paths& paths, int64_t b, int64_t nth)
      : b(b), first(nth * QUERIES), count(std::min(QUERIES, c.T - first)) {
    if (c.q_end) {
      const int64_t blocks = (c.bounds_rows > 1 ? b : 0) * c.blocks();
      q_end = &paths.q_end[blocks * c.block()], block_low = &paths.low[blocks], block_high = &paths.high[blocks];
    }
    const int64_t at = (c.bounds_rows > 1 ? b * c.T : 0) + first;
    low = c.S, high = 0, all_from = 0, all_to = count < QUERIES ? 0 : c.S;
    for (int64_t r = 0; r < QUERIES; ++r) {
      start[r] = r < count ? c.start[at + r] : 0;
      end[r] = r < count ? c.end[at + r] : 0;
      if (start[r] < end[r]) low = std::min<int64_t>(low, start[r]), high = std::max<int64_t>(high, end[r]);
      all_from = std::max<int64_t>(all_from, start[r]), all_to = std::min<int64_t>(all_to, end[r]);
    }
  }
};

// The keys of a block that a tile needs: [from, to) of the block, multiples of ALIGN.
struct Span {
  int64_t from, to, first;  // `first` is the index of the first of them among all keys
  bool whole;               // every query of the tile sees all of them
  Span(const Tile& t, int64_t j, int64_t block)
      : from(std::max<int64_t>(t.low - j * block, 0) / ALIGN * ALIGN),
        to(std::min(round_up(std::max<int64_t>(t.high - j * block, 0), ALIGN), block)),
        first(j * block + from),
        whole(t.all_from <= first && j * block + to <= t.all_to) {
    if (!t.q_end) return;
    if (t.block_high[j] <= t.first) to = from;  // the block is on no query's path
    whole = whole && t.block_low[j] >= t.first + t.count;
  }
  int64_t size() const { return std::max<int64_t>(to - from, 0); }
};

// Blocks of keys or values x [B, S, K, W] as left operands [block, W], in place; a last block that is not whole is
// copied and padded with zeros.
template <typename T>
struct BlockRows {
  const T* x;
  int64_t S, K, W, block;
  Buffer<T> tails;  // [B, K, block, W]
  BlockRows(const T* x, const Call& c, int64_t W)
      : x(x), S(c.S), K(c.K), W(W), block(c.block()), tails(c.S % block ? c.B * c.K * block * W : 0) {
    if (S % block == 0) return;
#pragma omp parallel for num_threads(c.threads)
    for (int64_t i = 0; i < c.B * K; ++i)
      for (int64_t s = 0; s < block; ++s) {
        const int64_t from = S / block * block + s;
        T* to = tails.at((i * block + s) * W);
        if (from < S) std::memcpy(to, x + ((i / K * S + from) * K + i % K) * W, W * sizeof(T));
        else std::fill_n(to, W, T(0));
      }
  }
  const T* at(int64_t group, int64_t j, int64_t from) const {
    if ((j + 1) * block > S) return tails.at((group * block + from) * W);
    return x + ((group / K * S + j * block + from) * K + group % K) * W;
  }
  int64_t stride(int64_t j) const { return (j + 1) * block > S ? W : K * W; }
};

// The same transposed: left operands [B, K, blocks] of [W, block].
template <typename T>
void transpose_blocks(const T* x, T* into, const Call& c, int64_t W) {
  const int64_t block = c.block(), blocks = c.blocks();
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < c.B * c.K * blocks; ++i) {
    const int64_t j = i % blocks, group = i / blocks;
    T* to = into + i * block * W;
    for (int64_t s = 0; s < block; ++s) {
      const bool exists = j * block + s < c.S;
      const T* from = x + ((group / c.K * c.S + j * block + s) * c.K + group % c.K) * W;
      for (int64_t d = 0; d < W; ++d) to[d * block + s] = exists ? from[d] : T(0);
    }
  }
}

template <typename T>
void forward(const Call& c, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse, float* row_maxes,
             float* inv_row_sums) {
  const int64_t block = c.block(), blocks = c.blocks(), tiles = c.tiles();
  const BlockRows<T> keys(k, c, c.D);
  const Paths paths(c);
  Buffer<T> values(c.B * c.K * blocks * block * c.Dv);  // [B, K, blocks] of [Dv, block]
  transpose_blocks(v, values.at(0), c, c.Dv);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<T> query(c.D * QUERIES), p(block * QUERIES);           // [D, QUERIES], [keys, QUERIES]
    Buffer<float> z(block * QUERIES), acc(c.Dv * QUERIES);        // [keys, QUERIES], [Dv, QUERIES]
    alignas(64) float row_max[QUERIES], row_sum[QUERIES], alpha[QUERIES];
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.H * tiles; ++unit) {
      // The last queries see the most keys: they come first, so that threads end together.
      const int64_t h = unit % c.H, b = unit / c.H % c.B, group = b * c.K + h / c.heads();
      const Tile t(c, paths, b, tiles - 1 - unit / c.H / c.B);
      const auto initial = RowState<float>::with_sink(sink[h]);
      std::fill_n(row_max, QUERIES, initial.row_max);
      std::fill_n(row_sum, QUERIES, initial.row_sum);
      std::fill_n(acc.at(0), c.Dv * QUERIES, 0.f);
      pack_rows(q, c, t, h, c.D, query.at(0));
      for (int64_t j = t.low / block; j * block < t.high; ++j) {
        const Span span(t, j, block);
        if (span.size() == 0) continue;
        product(span.size(), QUERIES, c.D, keys.at(group, j, span.from), query.at(0), z.at(0), false, keys.stride(j));
        if (online_softmax(c, t, span, z.at(0), p.at(0), row_max, row_sum, alpha))
          for (int64_t d = 0; d < c.Dv; ++d)
            for (int64_t i = 0; i < QUERIES; i += LANES)
              (Vec::loadu(acc.at(d * QUERIES + i)) * Vec::loadu(alpha + i)).store(acc.at(d * QUERIES + i));
        product(c.Dv, QUERIES, span.size(), values.at((group * blocks + j) * block * c.Dv + span.from), p.at(0),
                acc.at(0), true, block);
      }
      for (int64_t r = 0; r < t.count; ++r) {
        const int64_t at = (b * c.H + h) * c.T + t.first + r;
        const bool empty = t.start[r] >= t.end[r];  // also where there is a sink
        const RowState<float> state{row_max[r], row_sum[r]};
        lse[at] = empty ? -INF : state.lse();
        row_maxes[at] = empty ? 0.f : state.row_max;
        inv_row_sums[at] = alpha[r] = empty ? 0.f : state.inv_row_sum();
      }
      unpack_rows(acc.at(0), alpha, c, t, h, c.Dv, out);
    }
  }
}

// Sums the splits' gradients of the keys [first, last) of one KV head, in their order, into x [B, S, K, W].
template <typename T>
void sum_splits(const Call& c, int64_t group, int64_t first, int64_t last, const float* acc, int64_t splits, int64_t W,
                T* x) {
  const int64_t size = c.B * c.K * c.blocks() * c.block() * W;
  for (int64_t s = first; s < last; ++s) {
    T* to = x + ((group / c.K * c.S + s) * c.K + group % c.K) * W;
    for (int64_t d = 0; d < W; ++d) {
      float sum = acc[s * W + d];
      for (int64_t i = 1; i < splits; ++i) sum += acc[i * size + s * W + d];
      to[d] = T(sum);
    }
  }
}

// Chunks of queries are dealt out to a fixed number of splits.  Each split accumulates d_k and d_v on its own, so that
// results do not depend on the number of threads.  With one split, a thread reuses its accumulators for every KV head.
template <typename T>
void backward(const Call& c, const T* d_out, const T* q, const T* k, const T* v, const float* row_maxes,
              const float* inv_row_sums, const float* deltas, T* d_q, T* d_k, T* d_v) {
  const int64_t block = c.block(), blocks = c.blocks(), groups = c.B * c.K, size = blocks * block;
  const int64_t at_once = std::clamp<int64_t>(TILES / c.heads(), 1, std::max<int64_t>(c.tiles(), 1));
  const int64_t chunks = (c.tiles() + at_once - 1) / at_once;
  const int64_t splits = std::clamp<int64_t>(8 / std::max<int64_t>(groups, 1), 1, std::max<int64_t>(chunks, 1));
  const Paths paths(c);
  const BlockRows<T> keys(k, c, c.D), values(v, c, c.Dv);
  Buffer<T> keys_transposed(groups * size * c.D);  // [B, K, blocks] of [D, block]
  transpose_blocks(k, keys_transposed.at(0), c, c.D);
  const int64_t accumulators = splits == 1 ? c.threads : splits * groups;
  Buffer<float> key_acc(accumulators * size * c.D), value_acc(accumulators * size * c.Dv);
  const std::vector<float> one(QUERIES, 1.f);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    std::vector<QueryTile<T>> query_tiles;  // [tiles, heads] of a chunk
    for (int64_t i = 0; i < at_once * c.heads(); ++i) query_tiles.emplace_back(c);
    Buffer<T> p(block * QUERIES), d_z(block * QUERIES), d_z_pairs(block * QUERIES);  // [keys, QUERIES]
    Buffer<float> z(block * QUERIES), dp(block * QUERIES);                           // [keys, QUERIES]
    const T* d_z_right = std::is_same_v<T, float> ? d_z.at(0) : d_z_pairs.at(0);
    std::vector<Tile> tiles;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < groups * splits; ++unit) {
      const int64_t split = unit % splits, group = unit / splits, b = group / c.K, head = group % c.K * c.heads();
      const int64_t own = splits == 1 ? omp_get_thread_num() : split * groups + group;
      float* d_keys = key_acc.at(own * size * c.D);       // [S, D]
      float* d_values = value_acc.at(own * size * c.Dv);  // [S, Dv]
      std::fill_n(d_keys, size * c.D, 0.f);
      std::fill_n(d_values, size * c.Dv, 0.f);
      for (int64_t nth = split; nth < chunks; nth += splits) {
        tiles.clear();
        int64_t low = c.S, high = 0;
        for (int64_t i = nth * at_once; i < std::min((nth + 1) * at_once, c.tiles()); ++i) {
          const Tile& t = tiles.emplace_back(c, paths, b, i);
          low = std::min(low, t.low), high = std::max(high, t.high);
          for (int64_t g = 0; g < c.heads(); ++g)
            query_tiles[(tiles.size() - 1) * c.heads() + g].load(c, t, head + g, q, d_out, row_maxes, inv_row_sums,
                                                                 deltas);
        }
        for (int64_t j = low / block; j * block < high; ++j)
          for (int64_t i = 0; i < static_cast<int64_t>(tiles.size()) * c.heads(); ++i) {
            const Tile& t = tiles[i / c.heads()];
            const QueryTile<T>& x = query_tiles[i];
            const Span span(t, j, block);
            const int64_t n = span.size();
            if (n == 0) continue;
            product(n, QUERIES, c.D, keys.at(group, j, span.from), x.q_transposed.at(0), z.at(0), false,
                    keys.stride(j));
            product(n, QUERIES, c.Dv, values.at(group, j, span.from), x.d_out_transposed.at(0), dp.at(0), false,
                    values.stride(j));
            score_grads(c, t, x, span, z.at(0), dp.at(0), p.at(0), d_z.at(0), d_z_pairs.at(0));
            product(n, c.Dv, QUERIES, p.at(0), x.d_out.at(0), d_values + span.first * c.Dv, true);
            product(n, c.D, QUERIES, d_z.at(0), x.q.at(0), d_keys + span.first * c.D, true);
            product(c.D, QUERIES, n, keys_transposed.at((group * blocks + j) * block * c.D + span.from), d_z_right,
                    x.d_q.at(0), true, block);
          }
        for (int64_t i = 0; i < static_cast<int64_t>(tiles.size()) * c.heads(); ++i)
          unpack_rows(query_tiles[i].d_q.at(0), one.data(), c, tiles[i / c.heads()], head + i % c.heads(), c.D, d_q);
      }
      if (splits == 1) {
        sum_splits(c, group, 0, c.S, d_keys, 1, c.D, d_k);
        sum_splits(c, group, 0, c.S, d_values, 1, c.Dv, d_v);
      }
    }
  }
  if (splits == 1) return;
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < groups * blocks; ++i) {
    const int64_t group = i / blocks, first = i % blocks * block, last = std::min(first + block, c.S);
    sum_splits(c, group, first, last, key_acc.at(group * size * c.D), splits, c.D, d_k);
    sum_splits(c, group, first, last, value_acc.at(group * size * c.Dv), splits, c.Dv, d_v);
  }
}

}  // namespace

#define CALL \
  const int64_t *n, float scale, float softcap, const int32_t *start, const int32_t *end, const int32_t *q_end
#define MADE \
  Call { n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], {scale, softcap}, start, end, q_end }
#define EXPORT(NAME, T)                                                                                             \
  void attention_forward_##NAME(CALL, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse,    \
                                float* row_maxes, float* inv_row_sums) {                                            \
    forward<T>(MADE, q, k, v, sink, out, lse, row_maxes, inv_row_sums);                                             \
  }                                                                                                                 \
  void attention_backward_##NAME(CALL, const T* d_out, const T* q, const T* k, const T* v, const float* row_maxes,  \
                                 const float* inv_row_sums, const float* deltas, T* d_q, T* d_k, T* d_v) {          \
    backward<T>(MADE, d_out, q, k, v, row_maxes, inv_row_sums, deltas, d_q, d_k, d_v);                              \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
