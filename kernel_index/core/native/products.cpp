// Products whose rows do not depend on the other rows, and their gradients: see core/products.py.
//
// Each is made of brgemm calls, left rows times a packed panel of the right operand.  An element is the sum over R in
// blocks of BLOCK: within a block in rising order, in one accumulator, and one block after the other.  Neither the
// number of left rows, the width of the panel nor the thread that computes it has a part in that.
namespace {

constexpr int64_t BLOCK = 1024;  // of the summed dimension
constexpr int64_t ROWS = 128;    // left rows of a call: with a panel of WIDE columns their sums stay in the L1 cache
constexpr int64_t WIDE = 64, NARROW = 16;  // columns of a panel; a few tokens take the narrow ones

inline int64_t panel_width(int64_t columns) { return columns > NARROW ? WIDE : NARROW; }

// The right operand [R, columns] as panels [padded R, width], padded with zeros.
template <typename T>
struct Panels {
  int64_t R, columns, width, padded, threads;  // bfloat16 is multiplied in pairs of rows
  Buffer<T> data;
  Panels(int64_t R, int64_t columns, int64_t threads)
      : R(R), columns(columns), width(panel_width(columns)), padded(std::is_same_v<T, float> ? R : round_up(R, 2)),
        threads(threads), data(padded * round_up(columns, width)) {}
  int64_t count() const { return (columns + width - 1) / width; }
  const T* at(int64_t panel, int64_t r) const { return data.at(panel * padded * width + packed_at<T>(r, 0, width)); }

  // From memory where element (r, j) is at r · row + j · column.
  Panels& pack(const T* from, int64_t row, int64_t column) {
    const int64_t steps = (padded + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < count() * steps; ++unit) {
      const int64_t panel = unit / steps, first = unit % steps * BLOCK, last = std::min(first + BLOCK, padded);
      T* to = data.at(panel * padded * width);
      const auto value = [&](int64_t r, int64_t j) {
        return r < R && panel * width + j < columns ? from[r * row + (panel * width + j) * column] : T(0);
      };
      if (column == 1) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t j = 0; j < width; ++j) to[packed_at<T>(r, j, width)] = value(r, j);
      } else {
        for (int64_t j = 0; j < width; ++j)
          for (int64_t r = first; r < last; ++r) to[packed_at<T>(r, j, width)] = value(r, j);
      }
    }
    return *this;
  }
};

// Every tile of left [rows, R] times the panels goes to write(first row, rows, first column, sums [rows, width]).
template <typename T, typename Write>
void multiply(const T* left, int64_t rows, int64_t stride, const Panels<T>& right, Write write) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS, width = right.width;
#pragma omp parallel num_threads(right.threads)
  {
    MatrixUnits held;
    Buffer<float> sums(ROWS * width);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < blocks * right.count(); ++unit) {
      const int64_t panel = unit % right.count(), first = unit / right.count() * ROWS;
      const int64_t count = std::min(ROWS, rows - first);
      if (right.padded == 0) std::fill_n(sums.at(0), ROWS * width, 0.f);
      for (int64_t r = 0; r < right.padded; r += BLOCK)
        product(count, width, std::min(BLOCK, right.padded - r), left + first * stride + r, right.at(panel, r),
                sums.at(0), r > 0, stride);
      write(first, count, panel * width, sums.at(0));
    }
  }
}

// Tiles written where they stand, into x [rows, columns].
template <typename T>
auto in_place(T* x, int64_t columns, int64_t width) {
  return [=](int64_t first, int64_t count, int64_t column, const float* sums) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width && column + j < columns; j += LANES)
        store(x + (first + i) * columns + column + j, Vec::loadu(sums + i * width + j),
              std::min(LANES, columns - column - j));
  };
}

// x [M, R], weight [N, R]: y [M, N] = x · weightᵀ + bias.  The weight is the left operand, which is read in place; the
// tile of sums [N, M] is transposed when it is stored.
template <typename T, typename Out>
void forward(const int64_t* n, const T* x, const T* weight, const float* bias, Out* y) {
  const int64_t M = n[0], N = n[1], R = n[2];
  Panels<T> tokens(R, M, n[3]);
  tokens.pack(x, 1, R);
  const int64_t width = tokens.width;
  multiply(weight, N, R, tokens, [&](int64_t first, int64_t count, int64_t token, const float* sums) {
    for (int64_t j = 0; j < width && token + j < M; j += LANES)
      for (int64_t i = 0; i < count; i += LANES) {
        Vec square[LANES];
        for (int64_t r = 0; r < std::min(LANES, count - i); ++r) square[r] = Vec::loadu(sums + (i + r) * width + j);
        transpose(square);
        const int64_t outs = std::min(LANES, count - i);
        const Vec added = n[4] ? load(bias + first + i, outs) : Vec(0.f);
        for (int64_t t = 0; t < std::min(LANES, M - token - j); ++t)
          store(y + (token + j + t) * N + first + i, n[4] ? square[t] + added : square[t], outs);
      }
  });
}

// d_y [M, N], weight [N, R]: d_x [M, R] = d_y · weight.
template <typename T>
void d_input(const int64_t* n, const T* d_y, const T* weight, T* d_x) {
  const int64_t M = n[0], N = n[1], R = n[2];
  Panels<T> right(N, R, n[3]);
  right.pack(weight, R, 1);
  multiply(d_y, M, N, right, in_place(d_x, R, right.width));
}

// d_y [M, N], x [M, R]: d_weight [N, R] = d_yᵀ · x, the tokens in the order of their rows.
template <typename T>
void d_weight(const int64_t* n, const T* d_y, const T* x, T* d_weight) {
  const int64_t M = n[0], N = n[1], R = n[2], threads = n[3];
  Panels<T> right(M, R, threads);
  right.pack(x, R, 1);
  const int64_t padded = right.padded;
  Buffer<T> left(N * padded);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < N; ++i)
    for (int64_t m = 0; m < padded; ++m) *left.at(i * padded + m) = m < M ? d_y[m * N + i] : T(0);
  multiply<T>(left.at(0), N, padded, right, in_place(d_weight, R, right.width));
}

// Left [n, M, R] times right [n, N, R] transposed, of float32, to [n, M, N]; one thread for a pair of matrices.
void batch(const int64_t* n, const float* left, const float* right, float* y) {
  const int64_t count = n[0], M = n[1], N = n[2], R = n[3];
#pragma omp parallel for num_threads(n[4]) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    Panels<float> panels(R, N, 1);
    panels.pack(right + i * N * R, 1, R);
    multiply(left + i * M * R, M, R, panels, in_place(y + i * M * N, N, panels.width));
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
  void forward_##NAME##_float32(const int64_t* n, const T* x, const T* weight, const float* bias, float* y) {        \
    forward(n, x, weight, bias, y);                                                                                  \
  }                                                                                                                  \
  void forward_##NAME##_bfloat16(const int64_t* n, const T* x, const T* weight, const float* bias, BFloat16* y) {    \
    forward(n, x, weight, bias, y);                                                                                  \
  }                                                                                                                  \
  void d_input_##NAME(const int64_t* n, const T* d_y, const T* weight, T* d_x) { d_input(n, d_y, weight, d_x); }     \
  void d_weight_##NAME(const int64_t* n, const T* d_y, const T* x, T* d_w) { d_weight(n, d_y, x, d_w); }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
void batch_float32(const int64_t* n, const float* left, const float* right, float* y) { batch(n, left, right, y); }
}
