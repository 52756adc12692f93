// One step of MoBA's decoding: score the blocks' means, take the best, attend to their keys where they lie in the cache.
namespace {

struct Step {
  int64_t B, L, H, K, G, D, block, topk, page, table_width, mean_stride, means, added, left, threads;
  float scale, softcap;
  const int32_t *lengths, *table;  // no table: row b's tokens lie one after the other, `page` of them

  int64_t heads() const { return H / G; }
  // Where token s of row b starts, counted in elements of the cache [.., page, K, D].
  int64_t at(int64_t b, int64_t s, int64_t h) const {
    return (slot_of(table, table_width, page, b, s) * K + h) * D;
  }
};

// The blocks of a query in ascending order: its own, and the best of those before it.
void pick(const Step& c, const float* means, const float* mean_query, int64_t h, int64_t first, int64_t own,
          std::vector<int64_t>& keys, std::vector<int64_t>& picked) {
  keys.clear();
  for (int64_t j = first; j < std::min(own, c.means); ++j)
    keys.push_back(key_of(dot(mean_query, means + (j * c.K + h) * c.D, c.D), j));
  const int64_t kept = std::min<int64_t>(c.topk - 1, keys.size());
  std::nth_element(keys.begin(), keys.begin() + kept, keys.end(), std::greater<>());
  picked.clear();
  for (int64_t i = 0; i < kept; ++i) picked.push_back(block_of(keys[i]));
  std::sort(picked.begin(), picked.end());
  picked.push_back(own);
}

// Scores in place become weights that add up to 1.
inline void softmax(float* z, int64_t n, float scale, float softcap) {
  float top = -INF, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    z[i] *= scale;
    if (softcap != 0) z[i] = softcap * std::tanh(z[i] / softcap);
    top = std::max(top, z[i]);
  }
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t some = std::min(n - i, LANES);
    const Vec e = (Vec::loadu(z + i, some) - Vec(top)).exp();
    e.store(z + i, some);
    for (int64_t x = i; x < i + some; ++x) total += z[x];
  }
  for (int64_t i = 0; i < n; ++i) z[i] /= total;
}

template <typename T>
void decode(const Step& c, const T* q, const T* k, const T* v, const float* means, T* out) {
  const int64_t heads = c.heads(), width = round_up(c.D, LANES), most = c.topk * c.block;
#pragma omp parallel num_threads(c.threads)
  {
    std::vector<float> query(heads * width), mean(width), z(heads * most), sums(heads * width);
    std::vector<int64_t> keys, picked, rows;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.L * c.G; ++unit) {
      const int64_t g = unit % c.G, t = unit / c.G % c.L, b = unit / c.G / c.L, h = g * c.K / c.G;
      const int64_t at = ((b * c.L + t) * c.H + g * heads) * c.D, own = c.lengths[b] + c.added - c.L + t;
      std::fill_n(out + at, heads * c.D, T(0));
      if (own < 0) continue;
      std::fill(mean.begin(), mean.end(), 0.f);
      for (int64_t i = 0; i < heads; ++i)
        for (int64_t d = 0; d < c.D; ++d) mean[d] += query[i * width + d] = q[at + i * c.D + d];
      for (int64_t d = 0; d < c.D; ++d) mean[d] /= heads;
      const int64_t start = c.left < 0 ? 0 : std::max<int64_t>(0, own - c.left);
      pick(c, means + b * c.mean_stride, mean.data(), h, start / c.block, own / c.block, keys, picked);
      rows.clear();
      for (const int64_t j : picked)
        for (int64_t s = std::max(start, j * c.block); s <= std::min(own, (j + 1) * c.block - 1); ++s)
          rows.push_back(c.at(b, s, h));
      const int64_t n = rows.size();
      for (int64_t x = 0; x < n; ++x) {
        const T* ahead = k + rows[std::min(x + 8, n - 1)];
        for (int64_t d = 0; d < c.D * int64_t(sizeof(T)); d += 64) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + d);
        for (int64_t i = 0; i < heads; ++i) z[i * most + x] = dot(&query[i * width], k + rows[x], c.D);
      }
      for (int64_t i = 0; i < heads; ++i) softmax(&z[i * most], n, c.scale, c.softcap);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t x = 0; x < n; ++x) {
        const T* ahead = v + rows[std::min(x + 8, n - 1)];
        for (int64_t d = 0; d < c.D * int64_t(sizeof(T)); d += 64) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + d);
        for (int64_t d = 0; d < c.D; d += LANES) {
          const Vec values = load(v + rows[x] + d, c.D - d);
          for (int64_t i = 0; i < heads; ++i)
            at::vec::fmadd(Vec(z[i * most + x]), values, Vec::loadu(&sums[i * width + d])).store(&sums[i * width + d]);
        }
      }
      for (int64_t i = 0; i < heads; ++i)
        for (int64_t d = 0; d < c.D; ++d) out[at + i * c.D + d] = T(sums[i * width + d]);
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
  void moba_decode_##NAME(const int64_t* n, float scale, float softcap, const int32_t* lengths, const int32_t* table, \
                          const T* q, const T* k, const T* v, const float* means, T* out) {                           \
    decode<T>({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], scale,  \
               softcap, lengths, table},                                                                              \
              q, k, v, means, out);                                                                                   \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
