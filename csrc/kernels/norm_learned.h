// The gradients of the passes of norm.h where the grid is learned: what the activation made is computed again.
#pragma once

#include "norm.h"

namespace qat {

// Sums of the gradients of scale and zero point over a tensor, over parts that the shape alone decides.
struct GridSums {
  double scale, zero_point;
};

// `gradient_sums` of the pass, and the sums for its grid; that of the zero point is 0 unless it is wanted.
GridSums learned_gradient_sums(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* x,
                               Layout layout, const NormPass& pass, bool with_zero_point, double* sum, double* product);

// Of an addition and the steps of the pass, whose line is not used: dx is the gradient of either operand.
GridSums add_learned_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* x,
                              const float* other, float* dx, int64_t n, const NormPass& pass, bool with_zero_point);

}  // namespace qat
