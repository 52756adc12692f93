// A token or a few between two products: what Inductor's calls would take longer to begin than to do.  Rows are read into
// float32 whatever they are stored in, computed, and rounded once when they are stored.
namespace {

// Elements of rows of one tensor, float32 or bfloat16.
struct Rows {
  char* data;
  bool half;

  void read(int64_t at, int64_t n, float* to) const {
    if (!half) {
      std::copy_n(reinterpret_cast<const float*>(data) + at, n, to);
      return;
    }
    const auto* from = reinterpret_cast<const BFloat16*>(data) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
  void write(int64_t at, int64_t n, const float* from) const {
    if (!half) {
      std::copy_n(from, n, reinterpret_cast<float*>(data) + at);
      return;
    }
    auto* to = reinterpret_cast<BFloat16*>(data) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
};

// One coefficient set for the call, or one for each batch row.
struct Coefficients {
  const float* data;
  int64_t size, rows;
  const float* of(int64_t b) const { return data + (rows > 1 ? b * size : 0); }
};

constexpr int64_t STREAMS = 4;

}  // namespace

extern "C" void residual_rms_norm(const int64_t* n, float scale, float eps, float offset, char* residual, char* delta,
                                  const float* weight, char* stream, char* normed) {
  const int64_t rows = n[0], C = n[1], threads = n[5];
  const Rows in{residual, n[2] != 0}, added{delta, n[3] != 0}, kept{stream, n[4] != 0}, out{normed, n[3] != 0};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> x(C), y(C);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      in.read(r * C, C, x.at(0));
      added.read(r * C, C, y.at(0));
      for (int64_t i = 0; i < C; ++i) *x.at(i) += scale * *y.at(i);
      kept.write(r * C, C, x.at(0));
      kept.read(r * C, C, x.at(0));  // what is normalised is the stream as it is stored
      float lanes[LANES] = {};
      for (int64_t i = 0; i < C; ++i) lanes[i % LANES] += *x.at(i) * *x.at(i);
      float sum = 0;
      for (const float lane : lanes) sum += lane;
      const float by = 1 / std::sqrt(sum / C + eps);
      for (int64_t i = 0; i < C; ++i) *y.at(i) = *x.at(i) * by * (weight[i] + offset);
      out.write(r * C, C, y.at(0));
    }
  }
}

extern "C" void mix_streams(const int64_t* n, char* hidden, char* branch_out, const float* h_post, const float* h_res,
                            const float* h_pre, char* merged, char* read) {
  const int64_t B = n[0], T = n[1], C = n[2], threads = n[10];
  const bool merges = n[3] != 0, reads = n[4] != 0;
  const Rows in{hidden, n[5] != 0}, branch{branch_out, n[6] != 0}, kept{merged, n[5] != 0}, out{read, n[5] != 0};
  const Coefficients post{h_post, STREAMS, n[7]}, res{h_res, STREAMS * STREAMS, n[8]}, pre{h_pre, STREAMS, n[9]};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> x(STREAMS * C), y(STREAMS * C), z(C);
#pragma omp for
    for (int64_t i = 0; i < B * T; ++i) {
      const int64_t b = i / T;
      in.read(i * STREAMS * C, STREAMS * C, x.at(0));
      if (merges) {
        branch.read(i * C, C, z.at(0));
        for (int64_t o = 0; o < STREAMS; ++o) {
          const float *by = res.of(b) + o * STREAMS, own = post.of(b)[o];
          for (int64_t c = 0; c < C; ++c) {
            float sum = own * *z.at(c);
            for (int64_t s = 0; s < STREAMS; ++s) sum += by[s] * *x.at(s * C + c);
            *y.at(o * C + c) = sum;
          }
        }
        kept.write(i * STREAMS * C, STREAMS * C, y.at(0));
      }
      if (!reads) continue;
      const float *from = merges ? y.at(0) : x.at(0), *by = pre.of(b);
      for (int64_t c = 0; c < C; ++c) {
        float sum = 0;
        for (int64_t s = 0; s < STREAMS; ++s) sum += by[s] * from[s * C + c];
        *z.at(c) = sum;
      }
      out.write(i * C, C, z.at(0));
    }
  }
}

namespace {

// Pairs of one head's row: channels i and i + half, or 2i and 2i + 1.
void rotate_row(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &a = x[i * step], &b = x[i * step + apart];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

}  // namespace

extern "C" void rotate(const int64_t* n, char* q, char* k, const float* cos, const float* sin, char* q_out, char* k_out) {
  const int64_t B = n[0], T = n[1], H = n[2], K = n[3], D = n[4], half = n[5], table_rows = n[7], threads = n[9];
  const bool interleaved = n[6] != 0, low = n[8] != 0;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> x(D);
#pragma omp for
    for (int64_t i = 0; i < B * T; ++i) {
      const int64_t at = (table_rows > 1 ? i : i % T) * half;
      for (int64_t h = 0; h < H + K; ++h) {
        const Rows from{h < H ? q : k, low}, to{h < H ? q_out : k_out, low};
        const int64_t row = (h < H ? i * H + h : i * K + h - H) * D;
        from.read(row, D, x.at(0));
        rotate_row(x.at(0), cos + at, sin + at, half, interleaved);
        to.write(row, D, x.at(0));
      }
    }
  }
}
