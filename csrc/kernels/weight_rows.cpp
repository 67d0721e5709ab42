#include "weight_rows.h"

#include <cmath>

#include "blocks.h"

namespace qat {
namespace {

// Fewer rows would leave threads without work.
constexpr int64_t least_rows = 8;

// The range of w * factor, nan where there is one.
template <class T>
Range row_range(const TypedKernels<T>& kernels, const T* w, int64_t n, float factor) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  Extrema extrema{inf, -inf, 0};
  kernels.extrema_run(w, n, &extrema);
  // a product with a constant is monotone, its rounding too
  const float a = extrema.low * factor, b = extrema.high * factor;
  if (extrema.nonfinite == 0 && std::isfinite(a) && std::isfinite(b)) return {std::min(a, b), std::max(a, b)};
  Range range{inf, -inf};
  for (int64_t i = 0; i < n; ++i) {
    const float v = value_of(w[i]) * factor;
    if (std::isnan(v)) return {v, v};
    range.low = std::min(range.low, v);
    range.high = std::max(range.high, v);
  }
  return range;
}

}  // namespace

bool has_weight_rows(const Layout& layout, const Factor* factor) {
  if (layout.outer != 1 || layout.channels < least_rows || layout.inner % 8 != 0) return false;
  if (factor == nullptr) return true;
  const Layout& other = factor->layout;
  return other.outer == 1 && other.channels == layout.channels && other.inner == layout.inner;
}

template <class T>
void fake_quantize_rows(const Kernels& kernels, ParallelFor parallel, const T* w, T* y, uint8_t* bits, Layout layout,
                        const Factor* factor, float* scale, float* zero_point, const GridRule* rule, Range range) {
  struct Context {
    const TypedKernels<T>& kernels;
    const T* w;
    T* y;
    uint8_t* bits;
    int64_t length;
    const float* factor;
    float *scale, *zero_point;
    const GridRule* rule;
    Range range;
  } context{typed<T>(kernels), w, y, bits, layout.inner, factor == nullptr ? nullptr : factor->values,
            scale, zero_point, rule, range};
  const auto task = [](int64_t first, int64_t last, void* pointer) {
    const Context& c = *static_cast<const Context*>(pointer);
    for (int64_t row = first; row < last; ++row) {
      const T* const from = c.w + row * c.length;
      T* const to = c.y + row * c.length;
      uint8_t* const mask = c.bits == nullptr ? nullptr : c.bits + row * c.length / 8;
      if (c.rule != nullptr) {
        const Range found = row_range(c.kernels, from, c.length, c.factor == nullptr ? 1.0f : c.factor[row]);
        const CodeGrid grid = grid_of(found.low, found.high, *c.rule);
        c.scale[row] = grid.scale;
        c.zero_point[row] = static_cast<float>(grid.zero_point);
      }
      const float s = c.scale[row], z = c.zero_point[row];
      if (c.factor == nullptr) {
        c.kernels.quantize_run(from, to, mask, c.length, s, z, c.range);
      } else {
        c.kernels.weight_run(from, to, mask, c.length, c.factor[row], s, z, c.range);
      }
    }
  };
  parallel(0, layout.channels, std::max<int64_t>(1, grain * block / layout.inner), task, &context);
}

#define QAT_INSTANTIATE(T)                                                                                       \
  template void fake_quantize_rows<T>(const Kernels&, ParallelFor, const T*, T*, uint8_t*, Layout, const Factor*, \
                                      float*, float*, const GridRule*, Range);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
