// Batch norm or an addition, the activation and the statistics of the result, in one pass over memory.
#pragma once

#include "histogram.h"
#include "norm.h"

namespace qat {

// The passes of norm.h without a grid, the result observed as one channel; into the extrema alone where `out` has no
// counts. y may be x, or `other`.
void norm_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const float* x, float* y,
                  Layout layout, const NormPass& pass, const HistogramOut& out);
void add_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const float* x, const float* other,
                 float* y, int64_t n, Range bounds, const HistogramOut& out);

}  // namespace qat
