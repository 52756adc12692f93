// Attention under a mask of intervals: see attention/dense_attention/native.py.
//
// Scores are held transposed, keys down and queries across, so that a vector is one key's scores of LANES queries: peaks,
// sums, bounds and gradients of rows are vectors too, and nothing is added up across lanes.
namespace {

constexpr int64_t ROWS = 64;   // queries of a tile
constexpr int64_t KEYS = 128;  // of a block at most: two tiles of scores and a block's operands stay in the L2 cache
constexpr int64_t STEP = 16;   // what a product's keys are rounded to
constexpr int64_t TILES = 8;   // of a chunk of the backward pass, over all query heads of a key head

struct Call {
  int64_t B, T, S, H, K, D, Dv, bounds_rows, threads;
  float scale, softcap;
  const int32_t *start, *end;

  int64_t block() const { return std::min(KEYS, round_up(std::max<int64_t>(S, 1), STEP)); }  // keys of a block
  int64_t blocks() const { return (S + block() - 1) / block(); }
  int64_t tiles() const { return (T + ROWS - 1) / ROWS; }
  int64_t heads() const { return H / K; }  // query heads of a key head
  bool plain() const { return softcap == 0 && scale > 0; }
};

// A tile's queries and what they may see; those behind the last see nothing.
struct Tile {
  int64_t b, first, count, low, high, all_from, all_to;  // some query sees keys [low, high), every one [all_from, all_to)
  alignas(64) int32_t start[ROWS], end[ROWS];

  Tile(const Call& c, int64_t b, int64_t nth) : b(b), first(nth * ROWS), count(std::min(ROWS, c.T - first)) {
    const int64_t at = (c.bounds_rows > 1 ? b * c.T : 0) + first;
    low = c.S, high = 0, all_from = 0, all_to = count < ROWS ? 0 : c.S;
    for (int64_t r = 0; r < ROWS; ++r) {
      start[r] = r < count ? c.start[at + r] : 0;
      end[r] = r < count ? c.end[at + r] : 0;
      if (start[r] < end[r]) low = std::min<int64_t>(low, start[r]), high = std::max<int64_t>(high, end[r]);
      all_from = std::max<int64_t>(all_from, start[r]), all_to = std::min<int64_t>(all_to, end[r]);
    }
  }
};

// The keys of a block that a tile needs, [from, to) of the block, in steps; `whole` where every query sees all of them.
struct Span {
  int64_t from, to, first;  // `first` is the place of the first of them among all keys
  bool whole;
  Span(const Tile& t, int64_t j, int64_t block)
      : from(std::max<int64_t>(t.low - j * block, 0) / STEP * STEP),
        to(std::min(round_up(std::max<int64_t>(t.high - j * block, 0), STEP), block)),
        first(j * block + from),
        whole(t.all_from <= first && j * block + to <= t.all_to) {}
  int64_t size() const { return std::max<int64_t>(to - from, 0); }
};

// Keys or values x [B, S, K, W] as left operands, in place; a last block that is not whole is copied and filled up.
template <typename T>
struct Rows {
  const T* x;
  int64_t S, K, W, block;
  Buffer<T> tails;
  Rows(const T* x, const Call& c, int64_t W)
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

// The same across: left operands [W, block] of every block, [B, K, blocks].
template <typename T>
void across(const T* x, T* into, const Call& c, int64_t W) {
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

// A tile's rows of x [B, T, H, W] as right operands: across [W, ROWS], and as they are [ROWS, W] where `down` is given.
template <typename T>
void pack_rows(const T* x, const Call& c, const Tile& t, int64_t h, int64_t W, T* over, T* down = nullptr) {
  for (int64_t r = 0; r < ROWS; ++r) {
    const T* from = x + ((t.b * c.T + t.first + r) * c.H + h) * W;
    for (int64_t d = 0; d < W; ++d) {
      const T value = r < t.count ? from[d] : T(0);
      over[packed_at<T>(d, r, ROWS)] = value;
      if (down) down[packed_at<T>(r, d, W)] = value;
    }
  }
}

// [W, ROWS] of float32 into a tile's rows of x [B, T, H, W], each times its factor.
template <typename T>
void unpack_rows(const float* over, const float* factor, const Call& c, const Tile& t, int64_t h, int64_t W, T* x) {
  for (int64_t r = 0; r < t.count; ++r) {
    T* to = x + ((t.b * c.T + t.first + r) * c.H + h) * W;
    for (int64_t d = 0; d < W; ++d) to[d] = T(over[d * ROWS + r] * factor[r]);
  }
}

// Two keys' weights into a right operand: bfloat16 is multiplied in pairs.
inline void store_pair(float* to, int64_t i, Vec even, Vec odd) {
  even.store(to + i), odd.store(to + ROWS + i);
}
inline void store_pair(BFloat16* to, int64_t i, Vec even, Vec odd) {
  const auto [first, second] = at::vec::interleave2(even, odd);
  at::vec::convert_from_float<BFloat16>(first, second).store(to + 2 * i);
}

// −∞, or 0, where a query may not see key s.
inline Vec unseen(Vec x, const Tile& t, int64_t i, int64_t s, float value) {
  using Int = at::vec::Vectorized<int32_t>;
  const Int key(static_cast<int32_t>(s)), start = Int::loadu(t.start + i), end = Int::loadu(t.end + i);
  const Vec hidden = at::vec::cast<float>((key < start) | (key >= end));
  return Vec::blendv(x, Vec(value), hidden);
}

// Products of a block into weights, and what the tile's sums so far must be multiplied by.
template <typename T>
bool online_softmax(const Call& c, const Tile& t, const Span& span, float* z, T* p, float* peak, float* total,
                    float* factor) {
  if (!c.plain()) finish_scores(z, span.size() * ROWS, c.scale, c.softcap);
  const Vec scale(c.plain() ? c.scale : 1.f);
  bool grew = false;
  for (int64_t i = 0; i < ROWS; i += LANES) {
    Vec top(-INF);
    for (int64_t n = 0; n < span.size(); ++n) {
      Vec x = Vec::loadu(z + n * ROWS + i);
      if (!span.whole) (x = unseen(x, t, i, span.first + n, -INF)).store(z + n * ROWS + i);
      top = at::vec::maximum(top, x);
    }
    const Vec before = Vec::loadu(peak + i), now = at::vec::maximum(before, top * scale);
    const Vec shift = Vec::blendv(now, Vec(0.f), now == Vec(-INF)), change = (before - shift).exp();
    Vec sum(0.f);
    for (int64_t n = 0; n < span.size(); n += 2) {
      const Vec even = exponential(at::vec::fmsub(Vec::loadu(z + n * ROWS + i), scale, shift), T());
      const Vec odd = exponential(at::vec::fmsub(Vec::loadu(z + (n + 1) * ROWS + i), scale, shift), T());
      sum = sum + (even + odd);
      store_pair(p + n * ROWS, i, even, odd);
    }
    grew |= (now == before).zero_mask() != 0;
    now.store(peak + i);
    (Vec::loadu(total + i) * change + sum).store(total + i);
    change.store(factor + i);
  }
  return grew;
}

template <typename T>
void forward(const Call& c, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse, float* peaks,
             float* shares) {
  const int64_t block = c.block(), blocks = c.blocks(), tiles = c.tiles();
  const Rows<T> keys(k, c, c.D);
  Buffer<T> values(c.B * c.K * blocks * block * c.Dv);
  across(v, values.at(0), c, c.Dv);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    Buffer<T> query(c.D * ROWS), p(block * ROWS);
    Buffer<float> z(block * ROWS), sums(c.Dv * ROWS);
    alignas(64) float peak[ROWS], total[ROWS], factor[ROWS];
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.H * tiles; ++unit) {
      // The last queries see the most keys: begin with them, so that threads end together.
      const int64_t h = unit % c.H, b = unit / c.H % c.B, group = b * c.K + h / c.heads();
      const Tile t(c, b, tiles - 1 - unit / c.H / c.B);
      std::fill_n(peak, ROWS, sink[h]);
      std::fill_n(total, ROWS, sink[h] == -INF ? 0.f : 1.f);
      std::fill_n(sums.at(0), c.Dv * ROWS, 0.f);
      pack_rows(q, c, t, h, c.D, query.at(0));
      for (int64_t j = t.low / block; j * block < t.high; ++j) {
        const Span span(t, j, block);
        product(span.size(), ROWS, c.D, keys.at(group, j, span.from), query.at(0), z.at(0), false, keys.stride(j));
        if (online_softmax(c, t, span, z.at(0), p.at(0), peak, total, factor))
          for (int64_t d = 0; d < c.Dv; ++d)
            for (int64_t i = 0; i < ROWS; i += LANES)
              (Vec::loadu(sums.at(d * ROWS + i)) * Vec::loadu(factor + i)).store(sums.at(d * ROWS + i));
        product(c.Dv, ROWS, span.size(), values.at((group * blocks + j) * block * c.Dv + span.from), p.at(0),
                sums.at(0), true, block);
      }
      for (int64_t r = 0; r < t.count; ++r) {
        const int64_t at = (b * c.H + h) * c.T + t.first + r;
        const bool nothing = t.start[r] >= t.end[r];
        lse[at] = nothing ? -INF : peak[r] + std::log(total[r]);
        peaks[at] = nothing ? 0.f : peak[r];
        shares[at] = factor[r] = nothing ? 0.f : 1.f / total[r];
      }
      unpack_rows(sums.at(0), factor, c, t, h, c.Dv, out);
    }
  }
}

// What a tile of queries brings to the backward pass; weights come from the forward's own peaks and sums.
template <typename T>
struct Queries {
  Buffer<T> over, down, up_over, up_down;
  Buffer<float> d_over;
  alignas(64) float peak[ROWS], share[ROWS], delta[ROWS];
  explicit Queries(const Call& c)
      : over(c.D * ROWS), down(c.D * ROWS), up_over(c.Dv * ROWS), up_down(c.Dv * ROWS), d_over(c.D * ROWS) {}

  void load(const Call& c, const Tile& t, int64_t h, const T* q, const T* d_out, const float* peaks, const float* shares,
            const float* deltas) {
    pack_rows(q, c, t, h, c.D, over.at(0), down.at(0));
    pack_rows(d_out, c, t, h, c.Dv, up_over.at(0), up_down.at(0));
    std::fill_n(d_over.at(0), c.D * ROWS, 0.f);
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t at = (t.b * c.H + h) * c.T + t.first + r;
      const bool exists = r < t.count;
      peak[r] = exists ? peaks[at] : 0.f, share[r] = exists ? shares[at] : 0.f;
      delta[r] = exists ? deltas[at] : 0.f;
    }
  }
};

// A block's products z and dp into weights and the gradient of their scores, as left operands and the latter as a right
// one too; all 0 where a query sees nothing.
template <typename T>
void score_gradients(const Call& c, const Tile& t, const Queries<T>& x, const Span& span, const float* z, const float* dp,
                     T* p, T* d_z, T* d_z_pairs) {
  for (int64_t i = 0; i < ROWS; i += LANES) {
    const Vec peak = Vec::loadu(x.peak + i), share = Vec::loadu(x.share + i), delta = Vec::loadu(x.delta + i);
    const auto gradient = [&](int64_t n) {
      const int64_t at = n * ROWS + i;
      Vec above = at::vec::fmsub(Vec::loadu(z + at), Vec(c.scale), peak), slope(c.scale);
      if (c.softcap != 0) {
        const Vec capped = (Vec::loadu(z + at) * Vec(c.scale) / Vec(c.softcap)).tanh();
        above = Vec(c.softcap) * capped - peak;
        slope = slope * (Vec(1.f) - capped * capped);
      }
      Vec weight = exponential(above, T()) * share;
      if (!span.whole) weight = unseen(weight, t, i, span.first + n, 0.f);
      store(p + at, weight);
      const Vec d = weight * (Vec::loadu(dp + at) - delta) * slope;
      store(d_z + at, d);
      return d;
    };
    for (int64_t n = 0; n < span.size(); n += 2) {
      const Vec even = gradient(n), odd = gradient(n + 1);
      if constexpr (std::is_same_v<T, BFloat16>) store_pair(d_z_pairs + n * ROWS, i, even, odd);
    }
  }
}

// Sums over lanes, in their order, of the keys [first, last) of one key head, into x [B, S, K, W].
template <typename T>
void sum_lanes(const Call& c, int64_t group, int64_t first, int64_t last, const float* parts, int64_t lanes, int64_t W,
               T* x) {
  const int64_t lane = c.B * c.K * c.blocks() * c.block() * W;
  for (int64_t s = first; s < last; ++s) {
    T* to = x + ((group / c.K * c.S + s) * c.K + group % c.K) * W;
    for (int64_t d = 0; d < W; ++d) {
      float sum = parts[s * W + d];
      for (int64_t l = 1; l < lanes; ++l) sum += parts[l * lane + s * W + d];
      to[d] = T(sum);
    }
  }
}

// Chunks of queries are dealt out to a fixed number of lanes; each has sums of its own for keys and values, so that
// results do not depend on the number of threads.  Where one lane is all, a thread's own sums serve one key head after
// the other.
template <typename T>
void backward(const Call& c, const T* d_out, const T* q, const T* k, const T* v, const float* peaks, const float* shares,
              const float* delta, T* d_q, T* d_k, T* d_v) {
  const int64_t block = c.block(), blocks = c.blocks(), groups = c.B * c.K, size = blocks * block;
  const int64_t at_once = std::clamp<int64_t>(TILES / c.heads(), 1, std::max<int64_t>(c.tiles(), 1));
  const int64_t chunks = (c.tiles() + at_once - 1) / at_once;
  const int64_t lanes = std::clamp<int64_t>(8 / std::max<int64_t>(groups, 1), 1, std::max<int64_t>(chunks, 1));
  const Rows<T> keys(k, c, c.D), values(v, c, c.Dv);
  Buffer<T> keys_across(groups * size * c.D);
  across(k, keys_across.at(0), c, c.D);
  const int64_t kept = lanes == 1 ? c.threads : lanes * groups;
  Buffer<float> key_sums(kept * size * c.D), value_sums(kept * size * c.Dv);
  const std::vector<float> one(ROWS, 1.f);
#pragma omp parallel num_threads(c.threads)
  {
    MatrixUnits held;
    std::vector<Queries<T>> mine;
    for (int64_t i = 0; i < at_once * c.heads(); ++i) mine.emplace_back(c);
    Buffer<T> p(block * ROWS), d_z(block * ROWS), d_z_pairs(block * ROWS);
    Buffer<float> z(block * ROWS), dp(block * ROWS);
    const T* d_z_right = std::is_same_v<T, float> ? d_z.at(0) : d_z_pairs.at(0);
    std::vector<Tile> found;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < groups * lanes; ++unit) {
      const int64_t lane = unit % lanes, group = unit / lanes, b = group / c.K, head = group % c.K * c.heads();
      const int64_t own = lanes == 1 ? omp_get_thread_num() : lane * groups + group;
      float *own_keys = key_sums.at(own * size * c.D), *own_values = value_sums.at(own * size * c.Dv);
      std::fill_n(own_keys, size * c.D, 0.f);
      std::fill_n(own_values, size * c.Dv, 0.f);
      for (int64_t nth = lane; nth < chunks; nth += lanes) {
        found.clear();
        int64_t low = c.S, high = 0;
        for (int64_t i = nth * at_once; i < std::min((nth + 1) * at_once, c.tiles()); ++i) {
          const Tile& t = found.emplace_back(c, b, i);
          low = std::min(low, t.low), high = std::max(high, t.high);
          for (int64_t g = 0; g < c.heads(); ++g)
            mine[(found.size() - 1) * c.heads() + g].load(c, t, head + g, q, d_out, peaks, shares, delta);
        }
        for (int64_t j = low / block; j * block < high; ++j)
          for (int64_t i = 0; i < static_cast<int64_t>(found.size()) * c.heads(); ++i) {
            const Tile& t = found[i / c.heads()];
            const Queries<T>& x = mine[i];
            const Span span(t, j, block);
            const int64_t n = span.size();
            if (n == 0) continue;
            product(n, ROWS, c.D, keys.at(group, j, span.from), x.over.at(0), z.at(0), false, keys.stride(j));
            product(n, ROWS, c.Dv, values.at(group, j, span.from), x.up_over.at(0), dp.at(0), false, values.stride(j));
            score_gradients(c, t, x, span, z.at(0), dp.at(0), p.at(0), d_z.at(0), d_z_pairs.at(0));
            product(n, c.Dv, ROWS, p.at(0), x.up_down.at(0), own_values + span.first * c.Dv, true);
            product(n, c.D, ROWS, d_z.at(0), x.down.at(0), own_keys + span.first * c.D, true);
            product(c.D, ROWS, n, keys_across.at((group * blocks + j) * block * c.D + span.from), d_z_right,
                    x.d_over.at(0), true, block);
          }
        for (int64_t i = 0; i < static_cast<int64_t>(found.size()) * c.heads(); ++i)
          unpack_rows(mine[i].d_over.at(0), one.data(), c, found[i / c.heads()], head + i % c.heads(), c.D, d_q);
      }
      if (lanes == 1) {
        sum_lanes(c, group, 0, c.S, own_keys, 1, c.D, d_k);
        sum_lanes(c, group, 0, c.S, own_values, 1, c.Dv, d_v);
      }
    }
  }
  if (lanes == 1) return;
#pragma omp parallel for num_threads(c.threads)
  for (int64_t i = 0; i < groups * blocks; ++i) {
    const int64_t group = i / blocks, first = i % blocks * block, last = std::min(first + block, c.S);
    sum_lanes(c, group, first, last, key_sums.at(group * size * c.D), lanes, c.D, d_k);
    sum_lanes(c, group, first, last, value_sums.at(group * size * c.Dv), lanes, c.Dv, d_v);
  }
}

}  // namespace

#define CALL const int64_t *n, float scale, float softcap, const int32_t *start, const int32_t *end
#define MADE \
  Call { n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], scale, softcap, start, end }
#define EXPORT(NAME, T)                                                                                               \
  void attention_forward_##NAME(CALL, const T* q, const T* k, const T* v, const float* sink, T* out, float* lse,      \
                                float* peaks, float* shares) {                                                        \
    forward<T>(MADE, q, k, v, sink, out, lse, peaks, shares);                                                         \
  }                                                                                                                   \
  void attention_backward_##NAME(CALL, const T* d_out, const T* q, const T* k, const T* v, const float* peaks,        \
                                 const float* shares, const float* delta, T* d_q, T* d_k, T* d_v) {                   \
    backward<T>(MADE, d_out, q, k, v, peaks, shares, delta, d_q, d_k, d_v);                                           \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
