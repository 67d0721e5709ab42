// Fake quantization and the statistics of the values before it, in one pass over memory.
#pragma once

#include "histogram.h"

namespace qat {

// `fake_quantize`, and `observe_histogram` of x; its extrema alone where `out` has no counts. Histograms by channel take a
// second pass. y is not x.
template <class T>
void fake_quantize_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, T* y,
                           uint8_t* bits, Layout layout, const float* scale, const float* zero_point, Range range,
                           const HistogramOut& out);

}  // namespace qat
