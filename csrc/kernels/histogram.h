// Histograms of whole tensors by the upper bits of the float32 patterns.
#pragma once

#include "training.h"

namespace qat {

// counts: (channels, bins), a bin of which is the sign, the exponent and the leading bits of the mantissa.
struct HistogramOut {
  int64_t* counts;
  int mantissa_bits;
  ExtremaOut extrema;
  int64_t bins() const { return int64_t{1} << (9 + mantissa_bits); }
};

// Counts the elements, nan and infinities into no bin, and widens the extrema. `threads`: how many parts are worth
// counters of their own. `writer`: of one channel only.
template <class T>
void observe_histogram(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, Layout layout,
                       const HistogramOut& out, BlockWriter writer = {});

}  // namespace qat
