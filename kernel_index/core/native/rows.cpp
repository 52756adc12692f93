// Elementwise ops on one or a few tokens, for which starting a compiled region takes longer than the work.  Rows are
// read as float32 whatever their dtype, and rounded once, when they are stored.
namespace {

// The elements of one tensor, float32 or bfloat16.  `read` pads the n elements of a row with zeros to a whole vector.
struct Rows {
  char* data;
  bool half;

  void read(int64_t at, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; i += LANES)
      (half ? load(reinterpret_cast<const BFloat16*>(data) + at + i, n - i)
            : load(reinterpret_cast<const float*>(data) + at + i, n - i))
          .store(to + i);
  }
  void write(int64_t at, int64_t n, const float* from) const {
    for (int64_t i = 0; i < n; i += LANES) put(at + i, n - i, Vec::loadu(from + i));
  }
  // A vector of a row of which n elements are left.
  Vec get(int64_t at, int64_t n) const {
    return half ? load(reinterpret_cast<const BFloat16*>(data) + at, n)
                : load(reinterpret_cast<const float*>(data) + at, n);
  }
  void put(int64_t at, int64_t n, Vec x) const {
    const int64_t count = std::min(n, LANES);
    if (half)
      store(reinterpret_cast<BFloat16*>(data) + at, x, count);
    else
      x.store(reinterpret_cast<float*>(data) + at, count);
  }
};

// Coefficients [rows, size]: one set for the call, or one for each batch row.
struct Coefficients {
  const float* data;
  int64_t size, rows;
  const float* of(int64_t b) const { return data + (rows > 1 ? b * size : 0); }
};

constexpr int64_t STREAMS = 4;

}  // namespace

extern "C" void residual_rms_norm(const int64_t* n, float scale, float eps, float offset, char* residual, char* delta,
                                  const float* weight, char* stream, char* normed, float* rstd) {
  const int64_t rows = n[0], C = n[1], threads = n[5];
  const Rows in{residual, n[2] != 0}, added{delta, n[3] != 0}, kept{stream, n[4] != 0}, out{normed, n[3] != 0};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> x(round_up(C, LANES)), y(round_up(C, LANES));
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      in.read(r * C, C, x.at(0));
      added.read(r * C, C, y.at(0));
      for (int64_t i = 0; i < C; i += LANES) (Vec::loadu(x.at(i)) + Vec(scale) * Vec::loadu(y.at(i))).store(x.at(i));
      kept.write(r * C, C, x.at(0));
      kept.read(r * C, C, x.at(0));  // normalises the stream as it is stored
      Vec squares(0.f);
      for (int64_t i = 0; i < C; i += LANES) squares = squares + Vec::loadu(x.at(i)) * Vec::loadu(x.at(i));
      const float inverse_rms = 1 / std::sqrt(sum_of(squares) / C + eps);
      if (rstd) rstd[r] = inverse_rms;
      const Vec by(inverse_rms);
      for (int64_t i = 0; i < C; i += LANES)
        (Vec::loadu(x.at(i)) * by * (load(weight + i, C - i) + Vec(offset))).store(y.at(i));
      out.write(r * C, C, y.at(0));
    }
  }
}

namespace {

// What mix_streams and its backward pass know of a call; tensors that it has not are null.
struct Mixing {
  Rows hidden, branch, merged, read;  // of the forward pass, or their gradients
  Rows kept_hidden, kept_branch;      // backward: what the forward pass read
  Coefficients post, res, pre;
  int64_t T, C;
  float* products;
};

// One token.  Whether streams are merged is known here, so that all vectors are registers.
template <bool MERGES, bool READS>
void mix(const Mixing& m, int64_t i) {
  const int64_t b = i / m.T, C = m.C;
  for (int64_t c = 0; c < C; c += LANES) {
    const int64_t left = C - c;
    Vec x[STREAMS], y[STREAMS], z;
#pragma GCC unroll 4
    for (int64_t s = 0; s < STREAMS; ++s) x[s] = y[s] = m.hidden.get((i * STREAMS + s) * C + c, left);
    if (MERGES) {
      z = m.branch.get(i * C + c, left);
#pragma GCC unroll 4
      for (int64_t o = 0; o < STREAMS; ++o) {
        y[o] = Vec(m.post.of(b)[o]) * z;
#pragma GCC unroll 4
        for (int64_t s = 0; s < STREAMS; ++s) y[o] = y[o] + Vec(m.res.of(b)[o * STREAMS + s]) * x[s];
        m.merged.put((i * STREAMS + o) * C + c, left, y[o]);
      }
    }
    if (!READS) continue;
    Vec sum(0.f);
#pragma GCC unroll 4
    for (int64_t s = 0; s < STREAMS; ++s) sum = sum + Vec(m.pre.of(b)[s]) * y[s];
    m.read.put(i * C + c, left, sum);
  }
}

}  // namespace

extern "C" void mix_streams(const int64_t* n, char* hidden, char* branch_out, const float* h_post, const float* h_res,
                            const float* h_pre, char* merged, char* read) {
  const bool half = n[5] != 0, merges = n[3] != 0, reads = n[4] != 0;
  const Mixing m{{hidden, half}, {branch_out, n[6] != 0}, {merged, half}, {read, half}, {}, {}, {h_post, STREAMS, n[7]},
                 {h_res, STREAMS * STREAMS, n[8]}, {h_pre, STREAMS, n[9]}, n[1], n[2], nullptr};
#pragma omp parallel for num_threads(n[10])
  for (int64_t i = 0; i < n[0] * n[1]; ++i)
    merges ? reads ? mix<true, true>(m, i) : mix<true, false>(m, i) : mix<false, true>(m, i);
}

namespace {

// One token.  Which gradients come in, and whether there is a merge, is known here, so that all vectors are registers.
template <bool MERGES, bool MERGED, bool READ, bool PRODUCTS>
void mix_backward(const Mixing& m, int64_t i) {
  const int64_t b = i / m.T, C = m.C;
  Vec post[STREAMS], res[STREAMS][STREAMS], pre[STREAMS], both;  // the sums of products
  for (int64_t c = 0; c < C; c += LANES) {
    const int64_t left = C - c;
    Vec g[STREAMS], read;  // g: the gradient of the merged streams
    if (READ) read = m.read.get(i * C + c, left);
#pragma GCC unroll 4
    for (int64_t o = 0; o < STREAMS; ++o) {
      if (MERGED) g[o] = m.merged.get((i * STREAMS + o) * C + c, left);
      if (READ) g[o] = fmadd(Vec(m.pre.of(b)[o]), read, g[o]);
    }
    if (m.hidden.data) {
#pragma GCC unroll 4
      for (int64_t s = 0; s < STREAMS; ++s) {
        Vec sum = g[s];
        if (MERGES) {
          const float* by = m.res.of(b) + s;
          sum = Vec(by[0]) * g[0];
#pragma GCC unroll 3
          for (int64_t o = 1; o < STREAMS; ++o) sum = fmadd(Vec(by[o * STREAMS]), g[o], sum);
        }
        m.hidden.put((i * STREAMS + s) * C + c, left, sum);
      }
    }
    if (MERGES && m.branch.data) {
      const float* by = m.post.of(b);
      Vec sum = Vec(by[0]) * g[0];
#pragma GCC unroll 3
      for (int64_t o = 1; o < STREAMS; ++o) sum = fmadd(Vec(by[o]), g[o], sum);
      m.branch.put(i * C + c, left, sum);
    }
    if (!PRODUCTS) continue;
    Vec z;
    if (MERGES) z = m.kept_branch.get(i * C + c, left);
    if (MERGES && READ) both = fmadd(read, z, both);
#pragma GCC unroll 4
    for (int64_t s = 0; s < STREAMS; ++s) {
      const Vec x = m.kept_hidden.get((i * STREAMS + s) * C + c, left);
      if (READ) pre[s] = fmadd(read, x, pre[s]);
      if (!MERGES) continue;
      post[s] = fmadd(g[s], z, post[s]);
#pragma GCC unroll 4
      for (int64_t o = 0; o < STREAMS; ++o) res[o][s] = fmadd(g[o], x, res[o][s]);
    }
  }
  if (!PRODUCTS) return;
  float* to = m.products + i * (MERGES ? STREAMS + STREAMS * STREAMS + STREAMS + 1 : STREAMS);
  if (MERGES) {
    for (int64_t o = 0; o < STREAMS; ++o) *to++ = sum_of(post[o]);
    for (int64_t j = 0; j < STREAMS * STREAMS; ++j) *to++ = sum_of(res[j / STREAMS][j % STREAMS]);
  }
  for (int64_t s = 0; s < STREAMS; ++s) *to++ = sum_of(pre[s]);
  if (MERGES) *to = sum_of(both);
}

template <bool MERGES, bool MERGED, bool READ>
void mix_backward(const Mixing& m, int64_t tokens, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < tokens; ++i)
    m.products ? mix_backward<MERGES, MERGED, READ, true>(m, i) : mix_backward<MERGES, MERGED, READ, false>(m, i);
}

}  // namespace

// The gradients of mix_streams.  `products` [B · T, 25] are each token's part of those of h_post, h_res and h_pre, and
// the product of d_read and branch_out; without a merge [B · T, 4].  What is not asked for is null.  A product is summed
// lane by lane, then over the lanes.
extern "C" void mix_streams_backward(const int64_t* n, char* d_merged, char* d_read, char* hidden, char* branch_out,
                                     const float* h_post, const float* h_res, const float* h_pre, char* d_hidden,
                                     char* d_branch, float* products) {
  const bool low_hidden = n[6] != 0, low_branch = n[7] != 0;
  const Mixing m{{d_hidden, low_hidden}, {d_branch, low_branch}, {d_merged, n[4] != 0}, {d_read, n[5] != 0},
                 {hidden, low_hidden}, {branch_out, low_branch}, {h_post, STREAMS, n[8]},
                 {h_res, STREAMS * STREAMS, n[9]}, {h_pre, STREAMS, n[10]}, n[1], n[2], products};
  const int64_t tokens = n[0] * n[1], threads = n[11];
  if (!n[3])
    mix_backward<false, false, true>(m, tokens, threads);
  else if (d_merged && d_read)
    mix_backward<true, true, true>(m, tokens, threads);
  else if (d_merged)
    mix_backward<true, true, false>(m, tokens, threads);
  else
    mix_backward<true, false, true>(m, tokens, threads);
}

namespace {

// Rotates channels i and i + half of one head's row x [2 · half].
void rotate_halves(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t count = std::min(half - i, LANES);
    const Vec a = load(x + i, count), b = load(x + half + i, count), c = load(cos + i, count), s = load(sin + i, count);
    (a * c - b * s).store(x + i, count);
    (b * c + a * s).store(x + half + i, count);
  }
}

// Rotates channels 2i and 2i + 1.
void rotate_neighbours(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

extern "C" void rotate(const int64_t* n, char* q, char* k, const float* cos, const float* sin, char* q_out,
                       char* k_out) {
  const int64_t B = n[0], T = n[1], H = n[2], K = n[3], D = n[4], half = n[5], table_rows = n[7], threads = n[9];
  const bool interleaved = n[6] != 0, low = n[8] != 0;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> x(round_up(D, LANES));
#pragma omp for
    for (int64_t i = 0; i < B * T; ++i) {
      const int64_t at = (table_rows > 1 ? i : i % T) * half;
      for (int64_t h = 0; h < H + K; ++h) {
        const Rows from{h < H ? q : k, low}, to{h < H ? q_out : k_out, low};
        const int64_t row = (h < H ? i * H + h : i * K + h - H) * D;
        from.read(row, D, x.at(0));
        (interleaved ? rotate_neighbours : rotate_halves)(x.at(0), cos + at, sin + at, half);
        to.write(row, D, x.at(0));
      }
    }
  }
}
