// Functions whose value does not depend on an element's place, and sums in a fixed order: see core/stable.py.
namespace {

constexpr int64_t CHUNK = 4096;  // elements that a thread takes at a time: whole vectors, but for the last
constexpr int64_t ROWS = 64;     // of a partial sum over rows

template <typename F>
void map(const int64_t* n, const float* x, float* y, F function) {
#pragma omp parallel for num_threads(n[1])
  for (int64_t first = 0; first < n[0]; first += CHUNK)
    for (int64_t i = first; i < std::min(first + CHUNK, n[0]); i += LANES)
      store(y + i, function(load(x + i, n[0] - i)), std::min(LANES, n[0] - i));
}

template <typename F>
void map(const int64_t* n, const double* x, double* y, F function) {
#pragma omp parallel for num_threads(n[1])
  for (int64_t first = 0; first < n[0]; first += CHUNK)
    for (int64_t i = first; i < std::min(first + CHUNK, n[0]); i += Doubles::LANES)
      function(Doubles::load(x + i, n[0] - i)).store(y + i, n[0] - i);
}

}  // namespace

extern "C" {

void exp_float32(const int64_t* n, const float* x, float* y) { map(n, x, y, [](Vec v) { return v.exp(); }); }
void log_float32(const int64_t* n, const float* x, float* y) { map(n, x, y, [](Vec v) { return v.log(); }); }
void log1p_float32(const int64_t* n, const float* x, float* y) {
  map(n, x, y, [](Vec v) { return v.log1p(); });
}
void tanh_float32(const int64_t* n, const float* x, float* y) { map(n, x, y, [](Vec v) { return v.tanh(); }); }
void erf_float32(const int64_t* n, const float* x, float* y) { map(n, x, y, [](Vec v) { return v.erf(); }); }
void sigmoid_float32(const int64_t* n, const float* x, float* y) {
  map(n, x, y, [](Vec v) { return Vec(1.f) / (Vec(1.f) + (Vec(0.f) - v).exp()); });
}
void cos_float64(const int64_t* n, const double* x, double* y) { map(n, x, y, [](Doubles v) { return v.cos(); }); }
void sin_float64(const int64_t* n, const double* x, double* y) { map(n, x, y, [](Doubles v) { return v.sin(); }); }

// x [rows, C] to y [rows]: four sums of every fourth vector, then those together, then the lanes.
void row_sum(const int64_t* n, const float* x, float* y) {
  const int64_t rows = n[0], C = n[1];
#pragma omp parallel for num_threads(n[2])
  for (int64_t r = 0; r < rows; ++r) {
    Vec sums[4];
    for (int64_t i = 0; i < C; i += LANES) sums[i / LANES % 4] = sums[i / LANES % 4] + load(x + r * C + i, C - i);
    y[r] = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// x [rows, I, C] and z [rows, J, C] to y [rows, I, J]: the sums of their products over C, as row_sum adds them.
void pair_sums(const int64_t* n, const float* x, const float* z, float* y) {
  const int64_t rows = n[0], I = n[1], J = n[2], C = n[3];
#pragma omp parallel for num_threads(n[4])
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < I; ++i)
      for (int64_t j = 0; j < J; ++j) {
        Vec sums[4];
        for (int64_t c = 0; c < C; c += LANES) {
          Vec& sum = sums[c / LANES % 4];
          sum = sum + load(x + (r * I + i) * C + c, C - c) * load(z + (r * J + j) * C + c, C - c);
        }
        y[(r * I + i) * J + j] = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
}

// x [rows, C] to y [C]: sums over ROWS rows, added up in their order.
void column_sum(const int64_t* n, const float* x, float* y) {
  const int64_t rows = n[0], C = n[1];
#pragma omp parallel for num_threads(n[2])
  for (int64_t i = 0; i < C; i += LANES) {
    Vec sum(0.f);
    for (int64_t first = 0; first < rows; first += ROWS) {
      Vec part(0.f);
      for (int64_t r = first; r < std::min(first + ROWS, rows); ++r) part = part + load(x + r * C + i, C - i);
      sum = sum + part;
    }
    store(y + i, sum, std::min(LANES, C - i));
  }
}
}
