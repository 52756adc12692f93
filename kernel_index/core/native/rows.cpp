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
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t count = std::min(n - i, LANES);
      const Vec x = Vec::loadu(from + i);
      if (half)
        store(reinterpret_cast<BFloat16*>(data) + at + i, x, count);
      else
        x.store(reinterpret_cast<float*>(data) + at + i, count);
    }
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

extern "C" void mix_streams(const int64_t* n, char* hidden, char* branch_out, const float* h_post, const float* h_res,
                            const float* h_pre, char* merged, char* read) {
  const int64_t B = n[0], T = n[1], C = n[2], threads = n[10];
  const bool merges = n[3] != 0, reads = n[4] != 0;
  const Rows in{hidden, n[5] != 0}, branch{branch_out, n[6] != 0}, kept{merged, n[5] != 0}, out{read, n[5] != 0};
  const Coefficients post{h_post, STREAMS, n[7]}, res{h_res, STREAMS * STREAMS, n[8]}, pre{h_pre, STREAMS, n[9]};
#pragma omp parallel num_threads(threads)
  {
    const int64_t width = round_up(C, LANES);
    Buffer<float> x(STREAMS * width), y(STREAMS * width), z(width);
#pragma omp for
    for (int64_t i = 0; i < B * T; ++i) {
      const int64_t b = i / T;
      for (int64_t s = 0; s < STREAMS; ++s) in.read((i * STREAMS + s) * C, C, x.at(s * width));
      if (merges) {
        branch.read(i * C, C, z.at(0));
        for (int64_t o = 0; o < STREAMS; ++o) {
          for (int64_t c = 0; c < C; c += LANES) {
            Vec sum = Vec(post.of(b)[o]) * Vec::loadu(z.at(c));
            for (int64_t s = 0; s < STREAMS; ++s)
              sum = sum + Vec(res.of(b)[o * STREAMS + s]) * Vec::loadu(x.at(s * width + c));
            sum.store(y.at(o * width + c));
          }
          kept.write((i * STREAMS + o) * C, C, y.at(o * width));
        }
      }
      if (!reads) continue;
      const float* from = merges ? y.at(0) : x.at(0);
      for (int64_t c = 0; c < C; c += LANES) {
        Vec sum(0.f);
        for (int64_t s = 0; s < STREAMS; ++s) sum = sum + Vec(pre.of(b)[s]) * Vec::loadu(from + s * width + c);
        sum.store(z.at(c));
      }
      out.write(i * C, C, z.at(0));
    }
  }
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
