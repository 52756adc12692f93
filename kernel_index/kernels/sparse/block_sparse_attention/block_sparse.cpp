// Attention of each query to its picked blocks, by key block: see block_sparse_attention/native.py.
namespace {

constexpr int64_t CHUNK_BYTES = 1 << 20;  // of a chunk's float32 accumulators: they stay in the L2 cache
constexpr int64_t ROWS = 64;              // of a product: its operands and scores stay in the L1 cache

struct Call {
  int64_t B, T, S, H, K, G, D, Dv, n, block, bounds_rows, threads;
  float scale, softcap;
  const int32_t *selected, *start, *end;

  int64_t blocks() const { return (S + block - 1) / block; }
  int64_t padded() const { return round_up(block, LANES); }
  int64_t heads() const { return H / G; }           // query heads that share picks
  int64_t picks_at_once() const { return std::max<int64_t>(1, ROWS / heads()); }
  int64_t tile_rows() const { return round_up(picks_at_once() * heads(), 16); }
  int64_t chunk(int64_t width) const {
    return std::clamp<int64_t>(CHUNK_BYTES / (4 * width * heads()), 64, 2048);
  }
  int64_t key_head(int64_t g) const { return g * K / G; }
};

// The picks of some queries of one group, by block; of each block its queries ascend and are named once.
struct Lists {
  std::vector<int32_t> query;
  std::vector<int64_t> begin, stop;

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
      const int32_t* picks = c.selected + ((b * c.T + t) * c.G + g) * c.n;
      const int64_t low = c.start[bounds + t], high = c.end[bounds + t];
      for (int64_t i = 0; i < c.n; ++i) {
        const int64_t j = picks[i];
        if (j >= 0 && j < blocks && low < high && j * c.block < high && (j + 1) * c.block > low) f(t, j);
      }
    }
  }
};

// Which keys of block j query t may see, [low, high).
inline std::pair<int64_t, int64_t> limits(const Call& c, int64_t b, int64_t t, int64_t j) {
  const int64_t at = c.bounds_rows > 1 ? b * c.T + t : t;
  return {c.start[at] - j * c.block, std::min<int64_t>(c.end[at] - j * c.block, c.block)};
}

template <typename T>
void gather(const T* x, T* into, const int32_t* queries, int64_t count, int64_t b, int64_t g, const Call& c,
            int64_t width) {
  const int64_t size = c.heads() * width;
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(into + i * size, x + ((b * c.T + queries[i]) * c.H + g * c.heads()) * width, size * sizeof(T));
}

// One row's weights from its products z, and what its sums so far must be multiplied by.
template <typename T>
inline float online_softmax(const Call& c, float* z, T* p, int64_t width, int64_t low, int64_t high, float& peak,
                            float& total) {
  float scale = c.scale;  // left to the exponential's argument where nothing stands in the way
  if (c.softcap != 0 || !(scale > 0)) {
    finish_scores(z, width, scale, c.softcap);
    scale = 1;
  }
  for (int64_t i = 0; i < std::min(low, width); ++i) z[i] = -INF;
  for (int64_t i = std::max<int64_t>(high, 0); i < width; ++i) z[i] = -INF;
  Vec top(-INF);
  for (int64_t i = 0; i < width; i += LANES) top = at::vec::maximum(top, Vec::loadu(z + i));
  const float next = std::max(peak, max_of(top) * scale), shift = next == -INF ? 0.f : next;
  const float factor = peak == next ? 1.f : peak == -INF ? 0.f : std::exp(peak - shift);
  Vec sum(0.f);
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec e = exponential(at::vec::fmsub(Vec::loadu(z + i), Vec(scale), Vec(shift)), T());
    sum = sum + e;
    store(p + i, e);
  }
  total = total * factor + sum_of(sum);
  peak = next;
  return factor;
}

inline void scale_add(float* sums, const float* more, int64_t width, float factor) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    (Vec::loadu(sums + i) * Vec(factor) + Vec::loadu(more + i)).store(sums + i);
  for (; i < width; ++i) sums[i] = sums[i] * factor + more[i];
}

template <typename T>
void forward(const Call& c, const T* q, const T* k, const T* v, T* out, float* lse, float* peaks, float* shares) {
  const int64_t blocks = c.blocks(), padded = c.padded(), heads = c.heads(), chunk = c.chunk(c.Dv);
  Buffer<T> keys(c.B * c.K * blocks * padded * c.D), values(c.B * c.K * blocks * padded * c.Dv);
  pack_blocks(k, keys.at(0), c.B, c.S, c.K, c.D, c.block, padded, true, c.threads);
  pack_blocks(v, values.at(0), c.B, c.S, c.K, c.Dv, c.block, padded, false, c.threads);
  const int64_t chunks = (c.T + chunk - 1) / chunk, units = c.B * c.G * chunks, rows = c.tile_rows();
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<T> queries(rows * c.D), p(rows * padded);
    Buffer<float> z(rows * padded), o(rows * c.Dv), sums(chunk * heads * c.Dv);
    std::vector<float> peak(chunk * heads), total(chunk * heads), factor(rows);
    Lists lists;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      // The last queries pick among the most blocks: begin with them, so that threads end together.
      const int64_t b = unit % c.B, g = unit / c.B % c.G, nth = chunks - 1 - unit / c.B / c.G;
      const int64_t first = nth * chunk, last = std::min(first + chunk, c.T), group = b * c.K + c.key_head(g);
      std::fill(peak.begin(), peak.end(), -INF);
      std::fill(total.begin(), total.end(), 0.f);
      std::fill_n(sums.at(0), (last - first) * heads * c.Dv, 0.f);
      lists.build(c, b, g, first, last);
      for (int64_t j = 0; j < blocks; ++j)
        for (int64_t at = lists.begin[j]; at < lists.stop[j]; at += c.picks_at_once()) {
          const int64_t count = std::min(c.picks_at_once(), lists.stop[j] - at);
          const int64_t m = round_up(count * heads, 16);
          const int32_t* picked = &lists.query[at];
          gather(q, queries.at(0), picked, count, b, g, c, c.D);
          product(m, padded, c.D, queries.at(0), keys.at((group * blocks + j) * padded * c.D), z.at(0));
          for (int64_t r = 0; r < count * heads; ++r) {
            const int64_t row = (picked[r / heads] - first) * heads + r % heads;
            const auto [low, high] = limits(c, b, picked[r / heads], j);
            factor[r] =
                online_softmax(c, z.at(r * padded), p.at(r * padded), padded, low, high, peak[row], total[row]);
          }
          product(m, c.Dv, padded, p.at(0), values.at((group * blocks + j) * padded * c.Dv), o.at(0));
          for (int64_t r = 0; r < count * heads; ++r) {
            const int64_t row = (picked[r / heads] - first) * heads + r % heads;
            scale_add(sums.at(row * c.Dv), o.at(r * c.Dv), c.Dv, factor[r]);
          }
        }
      for (int64_t t = first; t < last; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = (t - first) * heads + h, head = g * heads + h;
          const bool nothing = peak[row] == -INF && total[row] == 0.f;
          const float inverse = nothing ? 0.f : 1.f / total[row];
          for (int64_t d = 0; d < c.Dv; ++d) out[((b * c.T + t) * c.H + head) * c.Dv + d] = sums.at(row * c.Dv)[d] * inverse;
          const int64_t at = (b * c.H + head) * c.T + t;
          lse[at] = nothing ? -INF : peak[row] + std::log(total[row]);
          peaks[at] = peak[row];
          shares[at] = inverse;
        }
    }
  }
}

// A tile's rows for backward: queries and upstream gradients as left operands and, packed, as right ones.
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

// [rows, width] of float32 as [width, rows] of T, by squares that fit a row of registers.
template <typename T>
void transpose(const float* from, T* to, int64_t rows, int64_t width) {
  alignas(64) float square[LANES * LANES];
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t i = 0; i < width; i += LANES) {
      at::vec::transpose_mxn<float, LANES, LANES>(from + r * width + i, width, square, LANES);
      for (int64_t x = 0; x < LANES; ++x) store(to + (i + x) * rows + r, Vec::loadu(square + x * LANES));
    }
}

// One row's weights p into z, and the gradient of its scores into dp; both 0 outside [low, high).  p is the forward's
// own: from the peak and the sum, since their log-sum-exp has lost what digits a large peak leaves it.
template <typename T>
inline void score_gradients(float* z, float* dp, T* d_z, int64_t width, int64_t low, int64_t high, float peak,
                            float share, float delta, float scale, float softcap) {
  for (int64_t i = 0; i < width; i += LANES) {
    Vec above = at::vec::fmsub(Vec::loadu(z + i), Vec(scale), Vec(peak)), slope(scale);
    if (softcap != 0) {
      const Vec t = (Vec::loadu(z + i) * Vec(scale) / Vec(softcap)).tanh();
      above = Vec(softcap) * t - Vec(peak);
      slope = slope * (Vec(1.f) - t * t);
    }
    const Vec p = exponential(above, T()) * Vec(share);
    p.store(z + i);
    (p * (Vec::loadu(dp + i) - Vec(delta)) * slope).store(dp + i);
  }
  for (float* x : {z, dp}) {
    for (int64_t i = 0; i < std::min(low, width); ++i) x[i] = 0;
    for (int64_t i = std::max<int64_t>(high, 0); i < width; ++i) x[i] = 0;
  }
  for (int64_t i = 0; i < width; i += LANES) store(d_z + i, Vec::loadu(dp + i));
}

// What one thread works in while it walks over tiles.
template <typename T>
struct Scratch {
  Buffer<T> q, d_out, q_right, d_out_right, d_z, p_across, d_z_across;
  Buffer<float> z, dp, d_q, sums;
  Lists lists;
  Scratch(const Call& c, int64_t rows, int64_t padded, int64_t chunk)
      : q(rows * c.D), d_out(rows * c.Dv), q_right(rows * c.D), d_out_right(rows * c.Dv), d_z(rows * padded),
        p_across(rows * padded), d_z_across(rows * padded), z(rows * padded), dp(rows * padded), d_q(rows * c.D),
        sums(chunk * c.heads() * c.D) {}
};

template <typename T>
struct Operands {
  const T *q, *d_out;
  const float *peaks, *shares, *delta;
  Buffer<T> keys_across, values_across, keys;
};

// A tile's share of the gradients: to its queries' sums, and to its block of keys and values.
template <typename T>
void backward_tile(const Call& c, const Operands<T>& x, Scratch<T>& my, const int32_t* picked, int64_t count, int64_t b,
                   int64_t g, int64_t j, int64_t first, float* d_k, float* d_v) {
  const int64_t heads = c.heads(), padded = c.padded(), used = count * heads, m = round_up(used, 16);
  const int64_t block = (b * c.K + c.key_head(g)) * c.blocks() + j;
  gather(x.q, my.q.at(0), picked, count, b, g, c, c.D);
  gather(x.d_out, my.d_out.at(0), picked, count, b, g, c, c.Dv);
  std::fill_n(my.q.at(used * c.D), (m - used) * c.D, T(0));  // these rows are summed over: nothing must be nothing
  std::fill_n(my.d_out.at(used * c.Dv), (m - used) * c.Dv, T(0));
  product(m, padded, c.D, my.q.at(0), x.keys_across.at(block * padded * c.D), my.z.at(0));
  product(m, padded, c.Dv, my.d_out.at(0), x.values_across.at(block * padded * c.Dv), my.dp.at(0));
  for (int64_t r = 0; r < used; ++r) {
    const int64_t t = picked[r / heads], head = g * heads + r % heads;
    const auto [low, high] = limits(c, b, t, j);
    score_gradients(my.z.at(r * padded), my.dp.at(r * padded), my.d_z.at(r * padded), padded, low, high,
                    x.peaks[(b * c.H + head) * c.T + t], x.shares[(b * c.H + head) * c.T + t],
                    x.delta[(b * c.T + t) * c.H + head], c.scale, c.softcap);
  }
  std::fill_n(my.z.at(used * padded), (m - used) * padded, 0.f);
  std::fill_n(my.dp.at(used * padded), (m - used) * padded, 0.f);
  product(m, c.D, padded, my.d_z.at(0), x.keys.at(block * padded * c.D), my.d_q.at(0));
  for (int64_t r = 0; r < used; ++r)
    scale_add(my.sums.at(((picked[r / heads] - first) * heads + r % heads) * c.D), my.d_q.at(r * c.D), c.D, 1.f);
  transpose(my.z.at(0), my.p_across.at(0), m, padded);
  transpose(my.dp.at(0), my.d_z_across.at(0), m, padded);
  const T* q_right = as_right_operand(my.q.at(0), my.q_right.at(0), m, c.D);
  const T* d_out_right = as_right_operand(my.d_out.at(0), my.d_out_right.at(0), m, c.Dv);
  product(padded, c.Dv, m, my.p_across.at(0), d_out_right, d_v, true);
  product(padded, c.D, m, my.d_z_across.at(0), q_right, d_k, true);
}

// Sums over lanes, in their order, as [B, S, K, W].
template <typename T>
void sum_lanes(const Call& c, const Buffer<float>& parts, int64_t lanes, int64_t W, T* into) {
  const int64_t padded = c.padded(), blocks = c.blocks(), lane = c.B * c.K * blocks * padded * W;
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < c.B * c.S; ++i) {
    const int64_t b = i / c.S, s = i % c.S;
    for (int64_t h = 0; h < c.K; ++h) {
      const float* from = parts.at((((b * c.K + h) * blocks + s / c.block) * padded + s % c.block) * W);
      for (int64_t d = 0; d < W; ++d) {
        float sum = from[d];
        for (int64_t l = 1; l < lanes; ++l) sum += from[l * lane + d];
        into[(i * c.K + h) * W + d] = T(sum);
      }
    }
  }
}

// Queries are dealt out to a fixed number of lanes; each has sums of its own for keys and values, so that results do
// not depend on the number of threads.
template <typename T>
void backward(const Call& c, const T* d_out, const T* q, const T* k, const T* v, const float* peaks, const float* shares,
              const float* delta, T* d_q, T* d_k, T* d_v) {
  const int64_t blocks = c.blocks(), padded = c.padded(), heads = c.heads(), chunk = c.chunk(c.D);
  const int64_t key_blocks = c.B * c.K * blocks, chunks = (c.T + chunk - 1) / chunk;
  const int64_t lanes = std::clamp<int64_t>(8 / std::max<int64_t>(c.B * c.K, 1), 1, std::max<int64_t>(chunks, 1));
  const int64_t size = key_blocks * padded;
  Operands<T> x{q, d_out, peaks, shares, delta, Buffer<T>(size * c.D), Buffer<T>(size * c.Dv), Buffer<T>(size * c.D)};
  pack_blocks(k, x.keys_across.at(0), c.B, c.S, c.K, c.D, c.block, padded, true, c.threads);
  pack_blocks(v, x.values_across.at(0), c.B, c.S, c.K, c.Dv, c.block, padded, true, c.threads);
  pack_blocks(k, x.keys.at(0), c.B, c.S, c.K, c.D, c.block, padded, false, c.threads);
  Buffer<float> key_sums(lanes * size * c.D), value_sums(lanes * size * c.Dv);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Scratch<T> my(c, c.tile_rows(), padded, chunk);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.K * lanes; ++unit) {
      const int64_t lane = unit % lanes, group = unit / lanes, b = group / c.K, h = group % c.K;
      float* own_keys = key_sums.at((lane * c.B * c.K + group) * blocks * padded * c.D);
      float* own_values = value_sums.at((lane * c.B * c.K + group) * blocks * padded * c.Dv);
      std::fill_n(own_keys, blocks * padded * c.D, 0.f);
      std::fill_n(own_values, blocks * padded * c.Dv, 0.f);
      for (int64_t nth = lane; nth < chunks; nth += lanes)
        for (int64_t g = h * c.G / c.K; g < (h + 1) * c.G / c.K; ++g) {
          const int64_t first = nth * chunk, last = std::min(first + chunk, c.T);
          std::fill_n(my.sums.at(0), (last - first) * heads * c.D, 0.f);
          my.lists.build(c, b, g, first, last);
          for (int64_t j = 0; j < blocks; ++j)
            for (int64_t at = my.lists.begin[j]; at < my.lists.stop[j]; at += c.picks_at_once())
              backward_tile(c, x, my, &my.lists.query[at], std::min(c.picks_at_once(), my.lists.stop[j] - at), b, g, j,
                            first, own_keys + j * padded * c.D, own_values + j * padded * c.Dv);
          for (int64_t t = first; t < last; ++t)
            for (int64_t i = 0; i < heads * c.D; ++i)
              d_q[((b * c.T + t) * c.H + g * heads) * c.D + i] = T(my.sums.at((t - first) * heads * c.D)[i]);
        }
    }
  }
  sum_lanes(c, key_sums, lanes, c.D, d_k);
  sum_lanes(c, value_sums, lanes, c.Dv, d_v);
}

}  // namespace

#define CALL const int64_t *n, float scale, float softcap, const int32_t *selected, const int32_t *start, const int32_t *end
#define MADE \
  Call { n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], scale, softcap, selected, start, end }
#define EXPORT(NAME, T)                                                                                           \
  void block_sparse_forward_##NAME(CALL, const T* q, const T* k, const T* v, T* out, float* lse, float* peaks,    \
                                   float* shares) {                                                               \
    forward<T>(MADE, q, k, v, out, lse, peaks, shares);                                                           \
  }                                                                                                               \
  void block_sparse_backward_##NAME(CALL, const T* d_out, const T* q, const T* k, const T* v, const float* peaks, \
                                    const float* shares, const float* delta, T* d_q, T* d_k, T* d_v) {            \
    backward<T>(MADE, d_out, q, k, v, peaks, shares, delta, d_q, d_k, d_v);                                       \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
