#include "quantize_observe.h"

#include "blocks.h"

namespace qat {

template <class T>
void fake_quantize_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, T* y,
                           uint8_t* bits, Layout layout, const float* scale, const float* zero_point, Range range,
                           const HistogramOut& out) {
  if (out.counts == nullptr) {
    fake_quantize(kernels, parallel, x, y, bits, layout, scale, zero_point, range, &out.extrema);
    return;
  }
  if (layout.channels > 1) {
    // counting gives a thread whole channels, so that it owns their counters, and quantizing gives it blocks of memory
    observe_histogram(kernels, parallel, threads, x, layout, out);
    fake_quantize(kernels, parallel, x, y, bits, layout, scale, zero_point, range, nullptr);
    return;
  }
  const auto quantize = [&](int64_t begin, int64_t end) {
    uint8_t* const to = bits == nullptr ? nullptr : bits + begin / 8;
    typed<T>(kernels).quantize_run(x + begin, y + begin, to, end - begin, *scale, *zero_point, range);
  };
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<decltype(&quantize)>(context))(begin, end);
  };
  observe_histogram(kernels, parallel, threads, x, layout, out, {call, &quantize});
}

#define QAT_INSTANTIATE(T)                                                                                     \
  template void fake_quantize_observe<T>(const Kernels&, ParallelFor, int64_t, const T*, T*, uint8_t*, Layout, \
                                         const float*, const float*, Range, const HistogramOut&);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
