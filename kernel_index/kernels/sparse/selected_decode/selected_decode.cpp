// A decoding step over a given selection: each query attends to the tokens of its blocks, in the cache itself.
namespace {

struct Selection {
  int64_t size, count, groups, left;  // tokens of a block; indices [B, L, groups, count]; left < 0: no window
  const int64_t* indices;
};

// The offsets of the tokens that query t of row b selects for a KV head, ascending, each once.
void list_offsets(const Step& c, const Selection& selection, int64_t b, int64_t t, int64_t h,
                  std::vector<int64_t>& blocks, std::vector<int64_t>& offsets) {
  const int64_t own = c.position(b, t), start = selection.left < 0 ? 0 : std::max<int64_t>(0, own - selection.left);
  const int64_t* first =
      selection.indices + ((b * c.L + t) * selection.groups + h % selection.groups) * selection.count;
  blocks.assign(first, first + selection.count);
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  offsets.clear();
  for (const int64_t j : blocks)  // the tokens of block −1 are negative
    for (int64_t s = std::max(start, j * selection.size); s <= std::min(own, (j + 1) * selection.size - 1); ++s)
      offsets.push_back(c.offset(b, s, h));
}

template <typename T>
void decode(const Step& c, const Selection& selection, const T* q, const T* k, const T* v, T* out) {
  const int64_t heads = c.heads();
#pragma omp parallel num_threads(c.threads)
  {
    SlotAttention<T> attention(c);
    std::vector<int64_t> blocks, offsets;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < c.B * c.L * c.K; ++unit) {
      const int64_t h = unit % c.K, t = unit / c.K % c.L, b = unit / c.K / c.L;
      const int64_t row = (b * c.L + t) * c.H + h * heads;
      list_offsets(c, selection, b, t, h, blocks, offsets);
      const int64_t n = offsets.size();
      Partials partials(heads, (n + SPLIT - 1) / SPLIT, c.D);
      attention.load_queries(q + row * c.D);
      for (int64_t x = 0; x < n; x += SPLIT)
        attention.attend(k, v, &offsets[x], std::min(SPLIT, n - x), partials, 0, x / SPLIT);
      for (int64_t i = 0; i < heads; ++i) partials.finish(i, out + (row + i) * c.D);
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                           \
  void selected_decode_##NAME(const int64_t* n, float scale, float softcap, const int32_t* lengths,               \
                              const int32_t* table, const T* q, const T* k, const T* v, const int64_t* indices,   \
                              T* out) {                                                                           \
    const Step c{n[0], n[1], n[2], n[3], n[3], n[4], n[5], n[6], n[7], n[12], {scale, softcap}, lengths, table};  \
    decode<T>(c, {n[8], n[9], n[10], n[11], indices}, q, k, v, out);                                              \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
