// Attention of each query to its selected blocks, one key block after the other: see native.py.
namespace {

constexpr int64_t CHUNK_BYTES = 1 << 20;  // float32 accumulators of a chunk of queries: they fit the L2 cache
constexpr int64_t ROWS = 64;              // rows of a tile: its operands and scores fit the L1 cache

struct Call {
  int64_t B, T, S, H, K, G, D, Dv, n, block, bounds_rows, threads;
  Scoring scoring;
  const int32_t *selected, *start, *end;  // [B, T, G, n]; [bounds_rows, T]: query t sees the keys start ≤ s < end

  int64_t blocks() const { return (S + block - 1) / block; }
  int64_t padded() const { return round_up(block, LANES); }
  int64_t heads() const { return H / G; }  // query heads that share a selection
  int64_t tile_queries() const { return std::max<int64_t>(1, ROWS / heads()); }
  int64_t tile_rows() const { return round_up(tile_queries() * heads(), 16); }
  int64_t chunk(int64_t width) const {
    return std::clamp<int64_t>(CHUNK_BYTES / (4 * width * heads()), 64, 2048);
  }
  int64_t kv_head(int64_t g) const { return g * K / G; }
};

// The selection of a chunk of queries of one group, inverted: block j is selected by query[begin[j] .. stop[j]), which
// ascend and differ.
struct InverseSelection {
  std::vector<int32_t> query;
  std::vector<int64_t> begin, stop;  // [blocks + 1], [blocks]

  void build(const Call& c, int64_t b, int64_t g, int64_t first, int64_t last) {
    const int64_t blocks = c.blocks();
    begin.assign(blocks + 1, 0);
    each(c, b, g, first, last, [&](int64_t, int64_t j) { ++begin[j + 1]; });
    for (int64_t j = 0; j < blocks; ++j) begin[j + 1] += begin[j];
    stop.assign(begin.begin(), begin.end() - 1);
    query.resize(begin[blocks]);
    each(c, b, g, first, last, [&](int64_t t, int64_t j) {
      if (stop[j] == begin[j] || query[stop[j] - 1] != t) query[stop[j]++] = t;
    });
  }

  template <typename F>
  static void each(const Call& c, int64_t b, int64_t g, int64_t first, int64_t last, F&& f) {
    const int64_t bounds = c.bounds_rows > 1 ? b * c.T : 0, blocks = c.blocks();
    for (int64_t t = first; t < last; ++t) {
      const int32_t* selected = c.selected + ((b * c.T + t) * c.G + g) * c.n;
      const int64_t low = c.start[bounds + t], high = c.end[bounds + t];
      for (int64_t i = 0; i < c.n; ++i) {
        const int64_t j = selected[i];
        if (j >= 0 && j < blocks && low < high && j * c.block < high && (j + 1) * c.block > low) f(t, j);
      }
    }
  }
};

// The keys [low, high) of block j that query t may see.
inline std::pair<int64_t, int64_t> visible(const Call& c, int64_t b, int64_t t, int64_t j) {
  const int64_t at = c.bounds_rows > 1 ? b * c.T + t : t;
  return {c.start[at] - j * c.block, std::min<int64_t>(c.end[at] - j * c.block, c.block)};
}

// Rows [count · heads, width] of x [B, T, H, width]: the heads of one group, for the given queries.
template <typename T>
void gather(const T* x, T* into, const int32_t* queries, int64_t count, int64_t b, int64_t g, const Call& c,
            int64_t width) {
  const int64_t size = c.heads() * width;
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(into + i * size, x + ((b * c.T + queries[i]) * c.H + g * c.heads()) * width, size * sizeof(T));
}

// z [width] of one row becomes its weights p [width]; keys outside [low, high) are masked.  Returns alpha.
template <typename T>
inline float masked_softmax_row(Scoring scoring, float* z, T* p, int64_t width, int64_t low, int64_t high,
                                RowState<float>& state) {
  if (!scoring.scale_folds()) scoring.apply(z, width);
  for (int64_t i = 0; i < std::min(low, width); ++i) z[i] = -INF;
  for (int64_t i = std::max<int64_t>(high, 0); i < width; ++i) z[i] = -INF;
  return softmax_row<T>(state, z, p, width, scoring.scale_folds() ? scoring.scale : 1.f);
}

template <typename T>
void forward(const Call& c, const T* q, const T* k, const T* v, T* out, float* lse, float* row_max,
             float* inv_row_sum) {
  const int64_t blocks = c.blocks(), padded = c.padded(), heads = c.heads(), chunk = c.chunk(c.Dv);
  Buffer<T> keys(c.B * c.K * blocks * padded * c.D);     // [B, K, blocks] of [D, padded]
  Buffer<T> values(c.B * c.K * blocks * padded * c.Dv);  // [B, K, blocks] of [padded, Dv]
  pack_blocks(k, keys.at(0), c.B, c.S, c.K, c.D, c.block, padded, true, c.threads);
  pack_blocks(v, values.at(0), c.B, c.S, c.K, c.Dv, c.block, padded, false, c.threads);
  const int64_t chunks = (c.T + chunk - 1) / chunk, units = c.B * c.G * chunks, rows = c.tile_rows();
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<T> queries(rows * c.D), p(rows * padded);  // [rows, D], [rows, padded]
    Buffer<float> z(rows * padded), o(rows * c.Dv);   // [rows, padded], [rows, Dv]
    Buffer<float> acc(chunk * heads * c.Dv);          // [chunk, heads, Dv]
    std::vector<RowState<float>> state(chunk * heads);
    std::vector<float> alpha(rows);
    InverseSelection inverse;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      // The last queries see the most keys: they come first, so that threads end together.
      const int64_t b = unit % c.B, g = unit / c.B % c.G, nth = chunks - 1 - unit / c.B / c.G;
      const int64_t first = nth * chunk, last = std::min(first + chunk, c.T), group = b * c.K + c.kv_head(g);
      std::fill(state.begin(), state.end(), RowState<float>{});
      std::fill_n(acc.at(0), (last - first) * heads * c.Dv, 0.f);
      inverse.build(c, b, g, first, last);
      for (int64_t j = 0; j < blocks; ++j)
        for (int64_t at = inverse.begin[j]; at < inverse.stop[j]; at += c.tile_queries()) {
          const int64_t count = std::min(c.tile_queries(), inverse.stop[j] - at);
          const int64_t m = round_up(count * heads, 16);
          const int32_t* query = &inverse.query[at];
          gather(q, queries.at(0), query, count, b, g, c, c.D);
          product(m, padded, c.D, queries.at(0), keys.at((group * blocks + j) * padded * c.D), z.at(0));
          for (int64_t r = 0; r < count * heads; ++r) {
            const int64_t row = (query[r / heads] - first) * heads + r % heads;
            const auto [low, high] = visible(c, b, query[r / heads], j);
            alpha[r] =
                masked_softmax_row(c.scoring, z.at(r * padded), p.at(r * padded), padded, low, high, state[row]);
          }
          product(m, c.Dv, padded, p.at(0), values.at((group * blocks + j) * padded * c.Dv), o.at(0));
          for (int64_t r = 0; r < count * heads; ++r) {
            const int64_t row = (query[r / heads] - first) * heads + r % heads;
            rescale_add(acc.at(row * c.Dv), alpha[r], o.at(r * c.Dv), 1.f, c.Dv);
          }
        }
      for (int64_t t = first; t < last; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = (t - first) * heads + h, head = g * heads + h;
          const float scale = state[row].empty() ? 0.f : state[row].inv_row_sum();
          for (int64_t d = 0; d < c.Dv; ++d)
            out[((b * c.T + t) * c.H + head) * c.Dv + d] = acc.at(row * c.Dv)[d] * scale;
          const int64_t at = (b * c.H + head) * c.T + t;
          lse[at] = state[row].lse();
          row_max[at] = state[row].row_max;
          inv_row_sum[at] = scale;
        }
    }
  }
}

// Rows [count, width] of a tile as a right operand.
template <typename T>
const T* as_right_operand(const T* rows, T* packed, int64_t count, int64_t width) {
  if constexpr (std::is_same_v<T, float>) return rows;
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t d = 0; d < width; ++d) {
      packed[r * width + 2 * d] = rows[r * width + d];
      packed[r * width + 2 * d + 1] = rows[(r + 1) * width + d];
    }
  return packed;
}

// [rows, width] of float32 to [width, rows] of T, in squares that fit the registers.
template <typename T>
void transpose(const float* from, T* to, int64_t rows, int64_t width) {
  Vec square[LANES];
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t i = 0; i < width; i += LANES) {
      for (int64_t x = 0; x < LANES; ++x) square[x] = Vec::loadu(from + (r + x) * width + i);
      transpose(square);
      for (int64_t x = 0; x < LANES; ++x) store(to + (i + x) * rows + r, square[x]);
    }
}

// z [width] of one row becomes its weights, dp [width] the gradient of z, which d_z holds as T; 0 outside [low, high).
template <typename T>
inline void score_grad_row(Scoring scoring, float* z, float* dp, T* d_z, int64_t width, int64_t low, int64_t high,
                           float row_max, float inv_row_sum, float delta) {
  for (int64_t i = 0; i < width; i += LANES) {
    const ScoreGrad grad = score_grad<T>(scoring, Vec::loadu(z + i), Vec::loadu(dp + i), Vec(row_max), Vec(inv_row_sum),
                                         Vec(delta), [](Vec x) { return x; });
    grad.p.store(z + i);
    grad.dz.store(dp + i);
  }
  for (float* x : {z, dp}) {
    for (int64_t i = 0; i < std::min(low, width); ++i) x[i] = 0;
    for (int64_t i = std::max<int64_t>(high, 0); i < width; ++i) x[i] = 0;
  }
  for (int64_t i = 0; i < width; i += LANES) store(d_z + i, Vec::loadu(dp + i));
}

// The buffers of one thread in the backward pass.
template <typename T>
struct Scratch {
  Buffer<T> q, d_out, q_right, d_out_right, d_z, p_transposed, d_z_transposed;  // [rows, D or Dv or padded]
  Buffer<float> z, dp, d_q, acc;  // [rows, padded] twice, [rows, D], [chunk, heads, D]
  InverseSelection inverse;
  Scratch(const Call& c, int64_t rows, int64_t padded, int64_t chunk)
      : q(rows * c.D), d_out(rows * c.Dv), q_right(rows * c.D), d_out_right(rows * c.Dv), d_z(rows * padded),
        p_transposed(rows * padded), d_z_transposed(rows * padded), z(rows * padded), dp(rows * padded),
        d_q(rows * c.D), acc(chunk * c.heads() * c.D) {}
};

template <typename T>
struct Operands {
  const T *q, *d_out;
  const float *row_max, *inv_row_sum, *delta;          // [B, H, T] twice, [B, T, H]
  Buffer<T> keys_transposed, values_transposed, keys;  // [B, K, blocks] of [D or Dv, padded], of [padded, D]
};

// Adds the gradients of a tile to its queries' accumulators, and to those of its block, d_k [padded, D] and
// d_v [padded, Dv].
template <typename T>
void backward_tile(const Call& c, const Operands<T>& x, Scratch<T>& my, const int32_t* query, int64_t count, int64_t b,
                   int64_t g, int64_t j, int64_t first, float* d_k, float* d_v) {
  const int64_t heads = c.heads(), padded = c.padded(), used = count * heads, m = round_up(used, 16);
  const int64_t block = (b * c.K + c.kv_head(g)) * c.blocks() + j;
  gather(x.q, my.q.at(0), query, count, b, g, c, c.D);
  gather(x.d_out, my.d_out.at(0), query, count, b, g, c, c.Dv);
  std::fill_n(my.q.at(used * c.D), (m - used) * c.D, T(0));  // products sum over these rows
  std::fill_n(my.d_out.at(used * c.Dv), (m - used) * c.Dv, T(0));
  product(m, padded, c.D, my.q.at(0), x.keys_transposed.at(block * padded * c.D), my.z.at(0));
  product(m, padded, c.Dv, my.d_out.at(0), x.values_transposed.at(block * padded * c.Dv), my.dp.at(0));
  for (int64_t r = 0; r < used; ++r) {
    const int64_t t = query[r / heads], head = g * heads + r % heads;
    const auto [low, high] = visible(c, b, t, j);
    score_grad_row(c.scoring, my.z.at(r * padded), my.dp.at(r * padded), my.d_z.at(r * padded), padded, low, high,
                   x.row_max[(b * c.H + head) * c.T + t], x.inv_row_sum[(b * c.H + head) * c.T + t],
                   x.delta[(b * c.T + t) * c.H + head]);
  }
  std::fill_n(my.z.at(used * padded), (m - used) * padded, 0.f);
  std::fill_n(my.dp.at(used * padded), (m - used) * padded, 0.f);
  product(m, c.D, padded, my.d_z.at(0), x.keys.at(block * padded * c.D), my.d_q.at(0));
  for (int64_t r = 0; r < used; ++r)
    rescale_add(my.acc.at(((query[r / heads] - first) * heads + r % heads) * c.D), 1.f, my.d_q.at(r * c.D), 1.f, c.D);
  transpose(my.z.at(0), my.p_transposed.at(0), m, padded);
  transpose(my.dp.at(0), my.d_z_transposed.at(0), m, padded);
  const T* q_right = as_right_operand(my.q.at(0), my.q_right.at(0), m, c.D);
  const T* d_out_right = as_right_operand(my.d_out.at(0), my.d_out_right.at(0), m, c.Dv);
  product(padded, c.Dv, m, my.p_transposed.at(0), d_out_right, d_v, true);
  product(padded, c.D, m, my.d_z_transposed.at(0), q_right, d_k, true);
}

// Sums the splits' gradients [splits, B, K, blocks, padded, W], in their order, to [B, S, K, W].
template <typename T>
void sum_splits(const Call& c, const Buffer<float>& acc, int64_t splits, int64_t W, T* into) {
  const int64_t padded = c.padded(), blocks = c.blocks(), size = c.B * c.K * blocks * padded * W;
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < c.B * c.S; ++i) {
    const int64_t b = i / c.S, s = i % c.S;
    for (int64_t h = 0; h < c.K; ++h) {
      const float* from = acc.at((((b * c.K + h) * blocks + s / c.block) * padded + s % c.block) * W);
      for (int64_t d = 0; d < W; ++d) {
        float sum = from[d];
        for (int64_t l = 1; l < splits; ++l) sum += from[l * size + d];
        into[(i * c.K + h) * W + d] = T(sum);
      }
    }
  }
}

// Chunks of queries are dealt out to a fixed number of splits.  Each split accumulates d_k and d_v on its own, so that
// results do not depend on the number of threads.
template <typename T>
void backward(const Call& c, const T* d_out, const T* q, const T* k, const T* v, const float* row_max,
              const float* inv_row_sum, const float* delta, T* d_q, T* d_k, T* d_v) {
  const int64_t blocks = c.blocks(), padded = c.padded(), heads = c.heads(), chunk = c.chunk(c.D);
  const int64_t key_blocks = c.B * c.K * blocks, chunks = (c.T + chunk - 1) / chunk;
  const int64_t splits = std::clamp<int64_t>(8 / std::max<int64_t>(c.B * c.K, 1), 1, std::max<int64_t>(chunks, 1));
  const int64_t size = key_blocks * padded;
  Operands<T> x{q, d_out, row_max, inv_row_sum, delta, Buffer<T>(size * c.D), Buffer<T>(size * c.Dv),
                Buffer<T>(size * c.D)};
  pack_blocks(k, x.keys_transposed.at(0), c.B, c.S, c.K, c.D, c.block, padded, true, c.threads);
  pack_blocks(v, x.values_transposed.at(0), c.B, c.S, c.K, c.Dv, c.block, padded, true, c.threads);
  pack_blocks(k, x.keys.at(0), c.B, c.S, c.K, c.D, c.block, padded, false, c.threads);
  Buffer<float> key_acc(splits * size * c.D), value_acc(splits * size * c.Dv);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Scratch<T> my(c, c.tile_rows(), padded, chunk);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.K * splits; ++unit) {
      const int64_t split = unit % splits, group = unit / splits, b = group / c.K, h = group % c.K;
      float* d_keys = key_acc.at((split * c.B * c.K + group) * blocks * padded * c.D);
      float* d_values = value_acc.at((split * c.B * c.K + group) * blocks * padded * c.Dv);
      std::fill_n(d_keys, blocks * padded * c.D, 0.f);
      std::fill_n(d_values, blocks * padded * c.Dv, 0.f);
      for (int64_t nth = split; nth < chunks; nth += splits)
        for (int64_t g = h * c.G / c.K; g < (h + 1) * c.G / c.K; ++g) {
          const int64_t first = nth * chunk, last = std::min(first + chunk, c.T);
          std::fill_n(my.acc.at(0), (last - first) * heads * c.D, 0.f);
          my.inverse.build(c, b, g, first, last);
          for (int64_t j = 0; j < blocks; ++j)
            for (int64_t at = my.inverse.begin[j]; at < my.inverse.stop[j]; at += c.tile_queries())
              backward_tile(c, x, my, &my.inverse.query[at], std::min(c.tile_queries(), my.inverse.stop[j] - at), b,
                            g, j, first, d_keys + j * padded * c.D, d_values + j * padded * c.Dv);
          for (int64_t t = first; t < last; ++t)
            for (int64_t i = 0; i < heads * c.D; ++i)
              d_q[((b * c.T + t) * c.H + g * heads) * c.D + i] = T(my.acc.at((t - first) * heads * c.D)[i]);
        }
    }
  }
  sum_splits(c, key_acc, splits, c.D, d_k);
  sum_splits(c, value_acc, splits, c.Dv, d_v);
}

}  // namespace

#define CALL \
  const int64_t *n, float scale, float softcap, const int32_t *selected, const int32_t *start, const int32_t *end
#define MADE \
  Call { n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], {scale, softcap}, selected, start, \
         end }
#define EXPORT(NAME, T)                                                                                             \
  void block_sparse_forward_##NAME(CALL, const T* q, const T* k, const T* v, T* out, float* lse, float* row_max,    \
                                   float* inv_row_sum) {                                                            \
    forward<T>(MADE, q, k, v, out, lse, row_max, inv_row_sum);                                                      \
  }                                                                                                                 \
  void block_sparse_backward_##NAME(CALL, const T* d_out, const T* q, const T* k, const T* v, const float* row_max, \
                                    const float* inv_row_sum, const float* delta, T* d_q, T* d_k, T* d_v) {         \
    backward<T>(MADE, d_out, q, k, v, row_max, inv_row_sum, delta, d_q, d_k, d_v);                                  \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
