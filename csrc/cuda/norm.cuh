// What the passes of batch norm on static and on learned grids share.
#pragma once

#include "affine.h"
#include "device.cuh"
#include "launch.h"

namespace qat::cuda {

// gamma and beta null: ones, zeros.
__device__ inline void set_line(const float* gamma, const float* beta, const float* mean, const float* inverse,
                                float* factor, float* shift, int64_t c) {
  const Line line = line_of(mean[c], inverse[c], gamma == nullptr ? 1.0f : gamma[c], beta == nullptr ? 0.0f : beta[c]);
  factor[c] = line.factor;
  shift[c] = line.shift;
}

__device__ inline DroppingSteps steps_of(const StepsOnDevice& s) {
  const bool quantize = s.scale != nullptr;
  return {{s.bounds.low, s.bounds.high, quantize, quantize ? *s.scale : 1.0f,
           quantize ? static_cast<float>(*s.zero_point) : 0.0f, s.codes, s.clips},
          s.drop};
}

struct ProductFinish {
  double count;
  NormSlopes s;
  __device__ void operator()(int64_t c, const Pair& sums) const {
    const Slope made = slope_of(sums, s.mean[c], s.inverse[c], s.gamma == nullptr ? 1.0f : s.gamma[c]);
    s.factor[c] = made.factor;
    s.dgamma[c] = made.dgamma;
    s.dbeta[c] = made.dbeta;
    if (s.slope == nullptr) return;
    s.slope[c] = static_cast<float>(made.slope / count);
    s.offset[c] = static_cast<float>(made.offset / count);
  }
};

}  // namespace qat::cuda
