// The gradients of fake quantization on a learned grid.
#pragma once

#include "ranges.h"

namespace qat {

// Sums of the gradient, one double a channel; those of the zero point may be null.
struct GridGradient {
  double *scale, *zero_point;
};

// dx gets the gradient of x; `sums` those of scale and zero point. The sums are double, over parts of the tensor that only
// its shape decides, added up in their order: they have the same bits for every number of threads. `clips`: those of a
// learned clip (PACT), which leaves the zero point.
template <class T>
void learned_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* x, T* dx, Layout layout,
                      const float* scale, const float* zero_point, Range range, const GridGradient& sums,
                      bool clips = false);

// The gradients of `fake_quantize_weight` (ranges.h) on a learned grid, the factor being a constant: dw is grad where the
// code was not clamped.
template <class T>
void learned_weight_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* w, T* dw,
                             Layout layout, const Factor& factor, const float* scale, const float* zero_point,
                             Range range, const GridGradient& sums);

}  // namespace qat
