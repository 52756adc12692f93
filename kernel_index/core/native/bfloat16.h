// What comes before everything else.  PyTorch's headers have the same and cost each source 2 s of compilation.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace c10 {

// As PyTorch has it: its name is part of the name of oneDNN's products in PyTorch's library.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(float x) {  // rounds to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof(x));
    bits = std::isnan(x) ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
};

}  // namespace c10

using c10::BFloat16;
