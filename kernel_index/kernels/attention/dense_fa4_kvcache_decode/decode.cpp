// A decoding step: write the new keys and values, then attend to what the cache holds, in place.
namespace {

template <typename T>
void append(const Step& c, const T* k, const T* v, T* k_cache, T* v_cache) {
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t i = 0; i < c.added; ++i) {
      const int64_t to = c.offset(b, c.lengths[b] + i, 0), from = (b * c.added + i) * c.K * c.D;
      std::memcpy(k_cache + to, k + from, c.K * c.D * sizeof(T));
      std::memcpy(v_cache + to, v + from, c.K * c.D * sizeof(T));
    }
}

// A unit of work is one split of the keys, for one query and one KV head: threads share a long row.
template <typename T>
void decode(const Step& c, int64_t left, int64_t right, const T* q, const T* k, const T* v, T* k_cache, T* v_cache,
            const float* sink, T* out) {
  append(c, k, v, k_cache, v_cache);
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) longest = std::max(longest, c.total(b));
  const int64_t splits = std::max<int64_t>((longest + SPLIT - 1) / SPLIT, 1), rows = c.B * c.L * c.H;
  Partials partials(rows, splits, c.D);
#pragma omp parallel num_threads(c.threads)
  {
    SlotAttention<T> attention(c);
    std::vector<int64_t> offsets;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.L * c.K * splits; ++unit) {
      const int64_t split = unit % splits, h = unit / splits % c.K, t = unit / splits / c.K % c.L;
      const int64_t b = unit / splits / c.K / c.L, row = (b * c.L + t) * c.H + h * c.heads(), own = c.position(b, t);
      const int64_t begin = left < 0 ? 0 : std::max<int64_t>(0, own - left);
      const int64_t end = right < 0 ? c.total(b) : std::clamp<int64_t>(own + right + 1, 0, c.total(b));
      offsets.clear();
      for (int64_t s = std::max(begin, split * SPLIT); s < std::min(end, (split + 1) * SPLIT); ++s)
        offsets.push_back(c.offset(b, s, h));
      if (offsets.empty()) continue;  // outside the window
      attention.load_queries(q + row * c.D);
      attention.attend(k_cache, v_cache, offsets.data(), offsets.size(), partials, row, split);
    }
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) partials.finish(row, out + row * c.D, sink[row % c.H]);
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                             \
  void decode_##NAME(const int64_t* n, float scale, float softcap, const int32_t* lengths, const int32_t* table,    \
                     const T* q, const T* k, const T* v, T* k_cache, T* v_cache, const float* sink, T* out) {       \
    const Step c{n[0], n[1], n[2], n[3], n[3], n[4], n[5], n[6], n[7], n[10], {scale, softcap}, lengths, table};    \
    decode<T>(c, n[8], n[9], q, k, v, k_cache, v_cache, sink, out);                                                 \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
