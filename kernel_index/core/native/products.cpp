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

// from [rows, n], rows `stride` apart, to [n, width] transposed, whole vectors, with zeros from row `rows` on.
template <typename T>
void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t n, T* to, int64_t width) {
  for (int64_t r = 0; r < n; r += LANES)
    for (int64_t j = 0; j < width; j += LANES) {
      Vec square[LANES];
      for (int64_t i = 0; i < std::min(LANES, rows - j); ++i) square[i] = load(from + (j + i) * stride + r, n - r);
      transpose(square);
      for (int64_t i = 0; i < std::min(LANES, n - r); ++i) store(to + (r + i) * width + j, square[i]);
    }
}

// Row r, and in bfloat16 row r + 1, of a panel [R, width] from `count` elements of each; zeros after them, and for null.
inline void pack_row(const float* row, const float*, int64_t count, float* to, int64_t width) {
  for (int64_t j = 0; j < width; j += LANES) (j < count ? load(row + j, count - j) : Vec()).store(to + j);
}
inline void pack_row(const BFloat16* row, const BFloat16* next, int64_t count, BFloat16* to, int64_t width) {
  for (int64_t j = 0; j < width; j += LANES)
    store_pairs(to + 2 * j, row + j, next ? next + j : nullptr, std::min(LANES, count - j));
}

// The right operand [R, columns] as panels [padded R, width], padded with zeros.
template <typename T>
struct Panels {
  static constexpr int64_t PAIR = std::is_same_v<T, float> ? 1 : 2;  // rows that are multiplied at once
  int64_t R, columns, width, padded, threads;
  Buffer<T> data;
  Panels(int64_t R, int64_t columns, int64_t threads)
      : R(R), columns(columns), width(panel_width(columns)), padded(round_up(R, PAIR)), threads(threads),
        data(padded * round_up(columns, width)) {}
  int64_t count() const { return (columns + width - 1) / width; }
  const T* at(int64_t panel, int64_t r) const { return data.at(panel * padded * width + r * width); }

  // From rows [R, columns].
  Panels& pack(const T* from) {
    return each([=](int64_t panel, int64_t first, int64_t last, T* to) {
      const int64_t column = panel * width;
      for (int64_t r = first; r < last; r += PAIR)
        pack_row(from + r * columns + column, r + 1 < R ? from + (r + 1) * columns + column : nullptr, columns - column,
                 to + r * width, width);
    });
  }
  // From columns [columns, R]; R is even in bfloat16, whose pairs are one after the other.
  Panels& pack_columns(const T* from) {
    return each([=](int64_t panel, int64_t first, int64_t last, T* to) {
      const int64_t column = panel * width;
      transpose_rows(reinterpret_cast<const float*>(from + column * R + first), R / PAIR,
                     std::min(width, columns - column), (last - first) / PAIR,
                     reinterpret_cast<float*>(to + first * width), width);  // pairs as words
    });
  }

 private:
  template <typename Pack>
  Panels& each(Pack pack) {
    const int64_t steps = (padded + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < count() * steps; ++unit) {
      const int64_t panel = unit / steps, first = unit % steps * BLOCK;
      pack(panel, first, std::min(first + BLOCK, padded), data.at(panel * padded * width));
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
  tokens.pack_columns(x);
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
  right.pack(weight);
  multiply(d_y, M, N, right, in_place(d_x, R, right.width));
}

// d_y [M, N], x [M, R]: d_weight [N, R] = d_yᵀ · x, the tokens in the order of their rows.
template <typename T>
void d_weight(const int64_t* n, const T* d_y, const T* x, T* d_weight) {
  const int64_t M = n[0], N = n[1], R = n[2], threads = n[3];
  Panels<T> right(M, R, threads);
  right.pack(x);
  const int64_t stride = round_up(right.padded, LANES);
  Buffer<T> left(N * stride);  // d_y transposed
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < N; i += LANES)
    transpose_rows(d_y + i, N, M, std::min(LANES, N - i), left.at(i * stride), stride);
  multiply<T>(left.at(0), N, stride, right, in_place(d_weight, R, right.width));
}

// Left [n, M, R] times right [n, N, R] transposed, of float32, to [n, M, N]; one thread for a pair of matrices.
void batch(const int64_t* n, const float* left, const float* right, float* y) {
  const int64_t count = n[0], M = n[1], N = n[2], R = n[3];
#pragma omp parallel for num_threads(n[4]) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    Panels<float> panels(R, N, 1);
    panels.pack_columns(right + i * N * R);
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
