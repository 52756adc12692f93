// One step of decoding: write the new keys and values, attend to what the cache then holds, where it lies.
namespace {

constexpr int64_t SPLIT = 256;  // keys of a unit of work: threads share a long row, in the same parts for any number

struct Step {
  int64_t B, L, H, K, D, page, table_width, added, left, right, threads;
  float scale, softcap;
  const int32_t *lengths, *table;  // no table: row b's tokens lie one after the other, `page` of them

  int64_t heads() const { return H / K; }
  // Where token s of row b starts, counted in elements of the cache [.., page, K, D].
  int64_t at(int64_t b, int64_t s, int64_t h) const {
    return (slot_of(table, table_width, page, b, s) * K + h) * D;
  }
  // The keys [first, second) of query t; the last query stands at the last key.
  std::pair<int64_t, int64_t> seen(int64_t b, int64_t t) const {
    const int64_t total = lengths[b] + added, own = total - L + t;
    return {left < 0 ? 0 : std::max<int64_t>(0, own - left),
            right < 0 ? total : std::clamp<int64_t>(own + right + 1, 0, total)};
  }
};

template <typename T>
void append(const Step& c, const T* k, const T* v, T* k_cache, T* v_cache) {
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t i = 0; i < c.added; ++i) {
      const int64_t to = c.at(b, c.lengths[b] + i, 0), from = (b * c.added + i) * c.K * c.D;
      std::memcpy(k_cache + to, k + from, c.K * c.D * sizeof(T));
      std::memcpy(v_cache + to, v + from, c.K * c.D * sizeof(T));
    }
}

// What a part of the keys brings to one head: the largest score, the sum of the weights against it, the weighted values.
struct Part {
  float *peak, *total, *sums;
};

template <typename T>
void attend(const Step& c, const float* query, const T* k, const T* v, const std::vector<int64_t>& rows, float* z, Part to) {
  const int64_t n = rows.size();
  for (int64_t x = 0; x < n; ++x) z[x] = dot(query, k + rows[x], c.D);
  std::fill(z + n, z + round_up(n, LANES), -INF);
  if (c.softcap != 0)
    for (int64_t x = 0; x < n; ++x) z[x] = c.softcap * std::tanh(z[x] * c.scale / c.softcap);
  const Vec scale(c.softcap != 0 ? 1.f : c.scale);
  Vec top(-INF), total(0.f);
  for (int64_t x = 0; x < n; x += LANES) {
    const Vec scaled = Vec::loadu(z + x) * scale;
    scaled.store(z + x);
    top = at::vec::maximum(top, scaled);
  }
  const float peak = max_of(top);
  for (int64_t x = 0; x < n; x += LANES) {
    const Vec e = (Vec::loadu(z + x) - Vec(peak)).exp();
    e.store(z + x);
    total = total + e;
  }
  for (int64_t d = 0; d < c.D; d += LANES) {
    Vec even(0.f), odd(0.f);  // two chains of additions, since each waits for the one before it
    for (int64_t x = 0; x + 1 < n; x += 2) {
      even = at::vec::fmadd(Vec(z[x]), load(v + rows[x] + d, c.D - d), even);
      odd = at::vec::fmadd(Vec(z[x + 1]), load(v + rows[x + 1] + d, c.D - d), odd);
    }
    if (n % 2) even = at::vec::fmadd(Vec(z[n - 1]), load(v + rows[n - 1] + d, c.D - d), even);
    (even + odd).store(to.sums + d, std::min(c.D - d, LANES));
  }
  *to.peak = peak, *to.total = sum_of(total);
}

template <typename T>
void decode(const Step& c, const T* q, const T* k, const T* v, T* k_cache, T* v_cache, T* out) {
  append(c, k, v, k_cache, v_cache);
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) longest = std::max<int64_t>(longest, c.lengths[b] + c.added);
  const int64_t parts = std::max<int64_t>((longest + SPLIT - 1) / SPLIT, 1), rows = c.B * c.L * c.H;
  Buffer<float> peaks(rows * parts), totals(rows * parts), sums(rows * parts * c.D);
#pragma omp parallel num_threads(c.threads)
  {
    std::vector<float> query(round_up(c.D, LANES)), z(SPLIT + LANES);
    std::vector<int64_t> places;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.L * c.K * parts; ++unit) {
      const int64_t part = unit % parts, h = unit / parts % c.K, t = unit / parts / c.K % c.L, b = unit / parts / c.K / c.L;
      const auto [low, high] = c.seen(b, t);
      places.clear();
      for (int64_t s = std::max(low, part * SPLIT); s < std::min(high, (part + 1) * SPLIT); ++s)
        places.push_back(c.at(b, s, h));
      for (int64_t i = 0; i < c.heads(); ++i) {
        const int64_t row = (b * c.L + t) * c.H + h * c.heads() + i;
        Part to{peaks.at(row * parts + part), totals.at(row * parts + part), sums.at((row * parts + part) * c.D)};
        *to.peak = -INF, *to.total = 0;
        if (places.empty()) continue;
        for (int64_t d = 0; d < c.D; ++d) query[d] = q[row * c.D + d];
        attend(c, query.data(), k_cache, v_cache, places, z.data(), to);
      }
    }
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      float peak = -INF, total = 0;
      for (int64_t p = 0; p < parts; ++p) peak = std::max(peak, *peaks.at(row * parts + p));
      std::vector<float> sum(c.D, 0.f);
      for (int64_t p = 0; p < parts; ++p) {
        if (*totals.at(row * parts + p) == 0) continue;
        const float share = std::exp(*peaks.at(row * parts + p) - peak);
        total += share * *totals.at(row * parts + p);
        for (int64_t d = 0; d < c.D; ++d) sum[d] += share * *sums.at((row * parts + p) * c.D + d);
      }
      for (int64_t d = 0; d < c.D; ++d) out[row * c.D + d] = T(total == 0 ? 0.f : sum[d] / total);
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                          \
  void decode_##NAME(const int64_t* n, float scale, float softcap, const int32_t* lengths, const int32_t* table, \
                     const T* q, const T* k, const T* v, T* k_cache, T* v_cache, T* out) {                       \
    decode<T>({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], scale, softcap, lengths, table}, \
              q, k, v, k_cache, v_cache, out);                                                                   \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
