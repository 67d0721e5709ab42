#include "training.h"

#include <mutex>

#include "blocks.h"

namespace qat {

template <class T>
void fake_quantize(const Kernels& kernels, ParallelFor parallel, const T* x, T* y, uint8_t* bits, Layout layout,
                   const float* scale, const float* zero_point, Range range, const ExtremaOut* extrema) {
  const TypedKernels<T>& k = typed<T>(kernels);
  std::mutex mutex;
  const BlockGrids grids(layout, scale, zero_point);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(extrema != nullptr ? layout : Layout{0, 0, 1});
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      uint8_t* const to = bits == nullptr ? nullptr : bits + begin / 8;
      if (extrema != nullptr) local.widen(k, x + begin, begin, end);
      grids.quantize(k, x + begin, y + begin, to, begin, end, range);
    }
    if (extrema != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex);
      local.merge_into(*extrema);
    }
  });
}

template <class T>
void mask_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const uint8_t* bits, T* out,
                   int64_t n) {
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    typed<T>(kernels).mask_run(grad + first, bits + first / 8, out + first, last - first);
  });
}

template <class T>
void observe_extrema(const Kernels& kernels, ParallelFor parallel, const T* x, Layout layout, ExtremaOut extrema,
                     BlockWriter writer) {
  std::mutex mutex;
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      writer(begin, end);
      local.widen(typed<T>(kernels), x + begin, begin, end);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    local.merge_into(extrema);
  });
}

#define QAT_INSTANTIATE(T)                                                                                          \
  template void fake_quantize<T>(const Kernels&, ParallelFor, const T*, T*, uint8_t*, Layout, const float*,         \
                                 const float*, Range, const ExtremaOut*);                                           \
  template void mask_gradient<T>(const Kernels&, ParallelFor, const T*, const uint8_t*, T*, int64_t);               \
  template void observe_extrema<T>(const Kernels&, ParallelFor, const T*, Layout, ExtremaOut, BlockWriter);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
