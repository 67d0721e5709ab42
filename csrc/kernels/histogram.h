// Histograms of whole tensors by the upper bits of the float32 patterns, alone or while fake-quantizing.
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
// counters of their own.
template <class T>
void observe_histogram(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, Layout layout,
                       const HistogramOut& out);

// Also fake-quantizes with one grid, as `fake_quantize`, in the same pass over memory. For one channel.
template <class T>
void fake_quantize_histogram(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, T* y,
                             uint8_t* bits, int64_t n, float scale, float zero_point, Range range,
                             const HistogramOut& out);

// errors[c, i] = the squared error of the density (points, jumps)[c, :] on the grid i of channel c, whose codes around
// zero are [low, high]; see `Kernels::clip_error`.
void clip_errors(const Kernels& kernels, ParallelFor parallel, const double* points, const double* jumps,
                 int64_t channels, int64_t count, const double* scale, const double* low, const double* high,
                 int64_t grids, double* errors);

}  // namespace qat
