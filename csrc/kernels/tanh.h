// DoReFa's weights: through the hyperbolic tangent, scaled to their own largest magnitude.
#pragma once

#include "training.h"

namespace qat {

// y = tanh(w) * ratio; returns ratio = m / tanh(m), m the largest magnitude, or 1 where that is zero or nan.
float tanh_weight(const Kernels& kernels, ParallelFor parallel, const float* w, float* y, int64_t n);

// The ratio being a constant.
void tanh_weight_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* w, float ratio,
                          float* dw, int64_t n);

}  // namespace qat
