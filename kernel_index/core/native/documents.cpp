// Attention whose rows do not depend on the other rows: see core/document_attention.py.
//
// Keys are counted from the start of a query's document, in segments of KEYS.  A row takes them in rising order with an
// online softmax.  A tile holds queries of one document, each in a lane of its own.  A key that a query does not see has
// the weight 0, which changes no sum: so the other queries of a tile, its width and its place have no part in a row.
namespace {

constexpr int64_t KEYS = 128;  // of a segment
// The number of keys of a product is a multiple of it, so that sums have one order: AMX adds up 32 bfloat16 terms at once,
// and of 112 keys oneDNN makes four parts of 28.
constexpr int64_t ALIGN = 32;
constexpr int64_t FEW = 16;    // queries of a narrow tile
constexpr int64_t QUERIES = TILE;

struct Call {
  int64_t B, T, S, stride, H, K, D, Dv, bounds_rows, threads;  // `stride` tokens from one row of k and v to the next
  Scoring scoring;
  const int32_t *start, *end, *origin;  // [bounds_rows, T]: query t sees start ≤ s < end of a document from origin on
  int64_t G, picks, block;              // and of these the keys of its blocks selected [B, T, G, picks], −1 for none
  const int32_t* selected;              // with G = 0 every block

  int64_t heads() const { return H / K; }  // query heads of a KV head
  int64_t bounds(int64_t b) const { return bounds_rows > 1 ? b * T : 0; }
};

// Consecutive queries of one document, and the segments of keys that they see.
struct Document {
  int64_t b, first, count, origin, end, from, to, buffer;  // keys [origin, end); segments [from, to), the first in buffers
  int64_t key(int64_t j) const { return origin + j * KEYS; }
};

std::vector<Document> documents_of(const Call& c) {
  std::vector<Document> found;
  int64_t buffer = 0;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t t = 0; t < c.T;) {
      const int64_t at = c.bounds(b);
      Document d{b, t, 0, c.origin[at + t], 0, 0, 0, buffer};
      int64_t low = c.S;
      for (; t < c.T && c.origin[at + t] == d.origin; ++t) {
        if (c.start[at + t] >= c.end[at + t]) continue;
        low = std::min<int64_t>(low, c.start[at + t]), d.end = std::max<int64_t>(d.end, c.end[at + t]);
      }
      d.count = t - d.first;
      if (low < d.end) d.from = (low - d.origin) / KEYS, d.to = (d.end - d.origin + KEYS - 1) / KEYS;
      buffer += d.to - d.from;
      found.push_back(d);
    }
  return found;
}

template <int64_t W>
struct Tile {
  static constexpr int64_t WIDTH = W;
  static constexpr const int32_t* q_end = nullptr;
  int64_t b, first, count, low, high, all_from, all_to;  // some query sees [low, high), every query [all_from, all_to)
  const Document* document;
  const uint16_t* chosen = nullptr;  // of each block of the document from that of key `low` on, the lanes that selected it
  int64_t block = 1;
  alignas(64) int32_t start[W], end[W];

  Tile(const Call& c, const Document& d, int64_t nth)
      : b(d.b), first(d.first + nth * W), count(std::min(W, d.first + d.count - first)), document(&d) {
    low = c.S, high = 0, all_from = 0, all_to = count < W ? 0 : c.S;
    for (int64_t r = 0; r < W; ++r) {
      start[r] = r < count ? c.start[c.bounds(b) + first + r] : 0;
      end[r] = r < count ? c.end[c.bounds(b) + first + r] : 0;
      if (start[r] < end[r]) low = std::min<int64_t>(low, start[r]), high = std::max<int64_t>(high, end[r]);
      all_from = std::max<int64_t>(all_from, start[r]), all_to = std::min<int64_t>(all_to, end[r]);
    }
  }
  int64_t of(int64_t s) const { return (s - document->origin) / block; }  // the block of a key
  // Whether some query selected a block of the keys [from, to).
  bool sees(int64_t from, int64_t to) const {
    if (!chosen) return true;
    if (std::max(from, low) >= std::min(to, high)) return false;
    for (int64_t j = of(std::max(from, low)); j <= of(std::min(to, high) - 1); ++j)
      for (int64_t i = 0; i < W / LANES; ++i)
        if (chosen[(j - of(low)) * (W / LANES) + i]) return true;
    return false;
  }
  int64_t from() const { return low < high ? (low - document->origin) / KEYS : 0; }
  int64_t to() const { return low < high ? (high - document->origin + KEYS - 1) / KEYS : 0; }
};

template <int64_t W>
inline uint16_t hidden_by(const Tile<W>& t, int64_t i, int64_t s) {
  if (!t.chosen) return 0;
  if (s < t.low || s >= t.high) return 0xffff;
  return ~t.chosen[(t.of(s) - t.of(t.low)) * (W / LANES) + i / LANES];
}

// The selection of a tile's queries for one query head, as lanes.
template <int64_t W>
struct Chosen {
  std::vector<uint16_t> lanes;
  void fill(const Call& c, Tile<W>& t, int64_t h) {
    if (!c.G || t.low >= t.high) return;
    t.block = c.block;
    const int64_t first = t.of(t.low), count = t.of(t.high - 1) + 1 - first, group = h / (c.H / c.G);
    lanes.assign(count * (W / LANES), 0);
    for (int64_t r = 0; r < t.count; ++r)
      for (int64_t p = 0; p < c.picks; ++p) {
        const int64_t j = c.selected[((t.b * c.T + t.first + r) * c.G + group) * c.picks + p] - first;
        if (j >= 0 && j < count) lanes[j * (W / LANES) + r / LANES] |= 1 << r % LANES;
      }
    t.chosen = lanes.data();
  }
};

template <int64_t W>
std::vector<Tile<W>> tiles_of(const Call& c, const std::vector<Document>& documents) {
  std::vector<Tile<W>> found;
  for (const Document& d : documents)
    for (int64_t i = 0; i * W < d.count; ++i) found.emplace_back(c, d, i);
  return found;
}

// The keys of a segment that a tile takes: `size()` of them, of which `exist` are in memory.
struct Span {
  int64_t first, keys, exist;
  bool whole;
  template <typename Tile>
  Span(const Call& c, const Tile& t, int64_t j)
      : first(t.document->key(j)), keys(std::min(KEYS, round_up(t.high - first, ALIGN))), exist(std::min(keys, c.S - first)),
        whole(!t.chosen && t.all_from <= first && first + keys <= t.all_to) {}
  int64_t size() const { return keys; }
};

template <typename T>
const T* key_at(const Call& c, const T* x, int64_t b, int64_t s, int64_t h, int64_t W) {
  return x + ((b * c.stride + s) * c.K + h) * W;
}

// Segments of x [B, S, K, W] transposed, [segments, K] of [W, KEYS]; 0 past the end of the document.
template <typename T>
Buffer<T> transposed_segments(const Call& c, const std::vector<Document>& documents, const T* x, int64_t W) {
  int64_t segments = 0;
  for (const Document& d : documents) segments += d.to - d.from;
  Buffer<T> found(segments * c.K * W * KEYS);
#pragma omp parallel for num_threads(c.threads) schedule(dynamic)
  for (int64_t i = 0; i < static_cast<int64_t>(documents.size()); ++i) {
    const Document& d = documents[i];
    for (int64_t j = d.from; j < d.to; ++j)
      for (int64_t h = 0; h < c.K; ++h) {
        T* to = found.at(((d.buffer + j - d.from) * c.K + h) * W * KEYS);
        for (int64_t n = 0; n < KEYS; ++n) {
          const bool exists = d.key(j) + n < d.end;
          const T* from = key_at(c, x, d.b, d.key(j) + n, h, W);
          for (int64_t w = 0; w < W; ++w) to[w * KEYS + n] = exists ? from[w] : T(0);
        }
      }
  }
  return found;
}

template <typename T>
const T* segment(const Call& c, const Buffer<T>& of, const Document& d, int64_t j, int64_t h, int64_t W) {
  return of.at(((d.buffer + j - d.from) * c.K + h) * W * KEYS);
}

template <typename T, int64_t W>
void forward_tiles(const Call& c, const std::vector<Document>& documents, const T* q, const T* k, const T* v,
                   const float* sink, T* out, float* lse, float* row_maxes, float* inv_row_sums) {
  const Buffer<T> values = transposed_segments(c, documents, v, c.Dv);
  const std::vector<Tile<W>> tiles = tiles_of<W>(c, documents);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<T> query(c.D * W), p(KEYS * W);
    Buffer<float> z(KEYS * W), acc(c.Dv * W);
    alignas(64) float row_max[W], row_sum[W], alpha[W];
    Chosen<W> chosen;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < static_cast<int64_t>(tiles.size()) * c.H; ++unit) {
      Tile<W> t = tiles[tiles.size() - 1 - unit / c.H];  // the last see the most keys: threads end together
      const int64_t h = unit % c.H, kv_head = h / c.heads();
      chosen.fill(c, t, h);
      const auto of_sink = RowState<float>::with_sink(sink[h]);
      // Where keys are selected the sink comes last: until then an empty state tells a row without a key.
      const auto initial = t.chosen ? RowState<float>() : of_sink;
      std::fill_n(row_max, W, initial.row_max);
      std::fill_n(row_sum, W, initial.row_sum);
      std::fill_n(acc.at(0), c.Dv * W, 0.f);
      pack_rows(q, c, t, h, c.D, query.at(0));
      for (int64_t j = t.from(); j < t.to(); ++j) {
        const Span span(c, t, j);
        if (!t.sees(span.first, span.first + span.keys)) continue;
        product(span.exist, W, c.D, key_at(c, k, t.b, span.first, kv_head, c.D), query.at(0), z.at(0), false, c.K * c.D);
        std::fill(z.at(span.exist * W), z.at(span.size() * W), 0.f);
        if (online_softmax(c, t, span, z.at(0), p.at(0), row_max, row_sum, alpha))
          for (int64_t d = 0; d < c.Dv; ++d)
            for (int64_t i = 0; i < W; i += LANES)
              (Vec::loadu(acc.at(d * W + i)) * Vec::loadu(alpha + i)).store(acc.at(d * W + i));
        product(c.Dv, W, span.size(), segment(c, values, *t.document, j, kv_head, c.Dv), p.at(0), acc.at(0), true, KEYS);
      }
      for (int64_t r = 0; r < t.count; ++r) {
        const int64_t at = (t.b * c.H + h) * c.T + t.first + r;
        RowState<float> state{row_max[r], row_sum[r]};
        const bool empty = t.start[r] >= t.end[r] || (t.chosen && state.empty());  // also where there is a sink
        const float shrunk = t.chosen ? state.merge(of_sink).first : 1.f;
        lse[at] = empty ? -INF : state.lse();
        row_maxes[at] = empty ? 0.f : state.row_max;
        inv_row_sums[at] = empty ? 0.f : state.inv_row_sum();
        alpha[r] = inv_row_sums[at] * shrunk;
      }
      unpack_rows(acc.at(0), alpha, c, t, h, c.Dv, out);
    }
  }
}

template <typename T>
void forward(const Call& c, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse, float* row_maxes,
             float* inv_row_sums) {
  const std::vector<Document> documents = documents_of(c);
  int64_t most = 0;
  for (const Document& d : documents) most = std::max(most, d.count);
  const auto run = most > FEW ? forward_tiles<T, QUERIES> : forward_tiles<T, FEW>;
  run(c, documents, q, k, v, sink, out, lse, row_maxes, inv_row_sums);
}

// delta [B, H, T] = Σ_d d_out · out − d_lse, what every score gradient subtracts; in place of d_lse.
template <typename T>
void subtract_from_delta(const Call& c, const T* d_out, const T* out, float* delta) {
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < c.B * c.T; ++i)
    for (int64_t h = 0; h < c.H; ++h) {
      Vec sum(0.f);
      for (int64_t d = 0; d < c.Dv; d += LANES)
        sum = fmadd(load(d_out + (i * c.H + h) * c.Dv + d, c.Dv - d), load(out + (i * c.H + h) * c.Dv + d, c.Dv - d), sum);
      float& at = delta[(i / c.T * c.H + h) * c.T + i % c.T];
      at = sum_of(sum) - at;
    }
}

// A document's gradients of keys and values are sums over its tiles of queries, in their order, by one thread.
template <typename T>
void backward(const Call& c, const T* d_out, const T* q, const T* k, const T* v, const T* out, const float* row_maxes,
              const float* inv_row_sums, float* delta, T* d_q, T* d_k, T* d_v) {
  subtract_from_delta(c, d_out, out, delta);
  const std::vector<Document> documents = documents_of(c);
  const Buffer<T> keys_transposed = transposed_segments(c, documents, k, c.D);
  const std::vector<float> one(QUERIES, 1.f);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    QueryTile<T> x(c);
    Buffer<T> p(KEYS * QUERIES), d_z(KEYS * QUERIES), d_z_pairs(KEYS * QUERIES);  // [keys, QUERIES]
    Buffer<float> z(KEYS * QUERIES), dp(KEYS * QUERIES);                          // [keys, QUERIES]
    const T* d_z_right = std::is_same_v<T, float> ? d_z.at(0) : d_z_pairs.at(0);
    std::vector<float> d_keys, d_values;  // [segments, KEYS, D], [segments, KEYS, Dv]
    Chosen<QUERIES> chosen;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < static_cast<int64_t>(documents.size()) * c.K; ++unit) {
      const Document& d = documents[unit / c.K];
      const int64_t kv_head = unit % c.K, segments = d.to - d.from;
      d_keys.assign(segments * KEYS * c.D, 0.f), d_values.assign(segments * KEYS * c.Dv, 0.f);
      for (int64_t nth = 0; nth * QUERIES < d.count; ++nth) {
        Tile<QUERIES> t(c, d, nth);
        for (int64_t h = kv_head * c.heads(); h < (kv_head + 1) * c.heads(); ++h) {
          chosen.fill(c, t, h);
          x.load(c, t, h, q, d_out, row_maxes, inv_row_sums, delta);
          for (int64_t j = t.from(); j < t.to(); ++j) {
            const Span span(c, t, j);
            if (!t.sees(span.first, span.first + span.keys)) continue;
            const int64_t n = span.size(), own = (j - d.from) * KEYS;
            product(span.exist, QUERIES, c.D, key_at(c, k, d.b, span.first, kv_head, c.D), x.q_transposed.at(0), z.at(0),
                    false, c.K * c.D);
            product(span.exist, QUERIES, c.Dv, key_at(c, v, d.b, span.first, kv_head, c.Dv), x.d_out_transposed.at(0),
                    dp.at(0), false, c.K * c.Dv);
            std::fill(z.at(span.exist * QUERIES), z.at(n * QUERIES), 0.f);
            std::fill(dp.at(span.exist * QUERIES), dp.at(n * QUERIES), 0.f);
            score_grads(c, t, x, span, z.at(0), dp.at(0), p.at(0), d_z.at(0), d_z_pairs.at(0));
            product(n, c.Dv, QUERIES, p.at(0), x.d_out.at(0), &d_values[own * c.Dv], true);
            product(n, c.D, QUERIES, d_z.at(0), x.q.at(0), &d_keys[own * c.D], true);
            product(c.D, QUERIES, n, segment(c, keys_transposed, d, j, kv_head, c.D), d_z_right, x.d_q.at(0), true, KEYS);
          }
          unpack_rows(x.d_q.at(0), one.data(), c, t, h, c.D, d_q);
        }
      }
      for (int64_t s = d.key(d.from); s < d.end; ++s) {
        const int64_t from = s - d.key(d.from), to = (d.b * c.S + s) * c.K + kv_head;
        for (int64_t w = 0; w < c.D; ++w) d_k[to * c.D + w] = T(d_keys[from * c.D + w]);
        for (int64_t w = 0; w < c.Dv; ++w) d_v[to * c.Dv + w] = T(d_values[from * c.Dv + w]);
      }
    }
  }
}

}  // namespace

#define CALL \
  const int64_t *n, float scale, float softcap, const int32_t *start, const int32_t *end, const int32_t *origin,    \
      const int32_t *selected
#define MADE \
  Call {                                                                                                            \
    n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], {scale, softcap}, start, end, origin, n[10], n[11], \
        n[12], selected                                                                                             \
  }
#define EXPORT(NAME, T)                                                                                              \
  void forward_##NAME(CALL, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse,               \
                      float* row_maxes, float* inv_row_sums) {                                                       \
    forward<T>(MADE, q, k, v, sink, out, lse, row_maxes, inv_row_sums);                                              \
  }                                                                                                                  \
  void backward_##NAME(CALL, const T* d_out, const T* q, const T* k, const T* v, const T* out,                       \
                       const float* row_maxes, const float* inv_row_sums, float* delta, T* d_q, T* d_k, T* d_v) {    \
    backward<T>(MADE, d_out, q, k, v, out, row_maxes, inv_row_sums, delta, d_q, d_k, d_v);                           \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
