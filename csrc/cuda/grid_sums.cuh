// From the sums for a learned grid to the gradients of scale and zero point.
#pragma once

#include "device.cuh"
#include "terms.h"

namespace qat::cuda {

struct FinishGrid {
  double grad_scale;
  float *dscale, *dzero_point;  // the second may be null
  __device__ void operator()(int64_t channel, const Pair& sums) const {
    dscale[channel] = static_cast<float>(sums.first * grad_scale);
    if (dzero_point != nullptr) dzero_point[channel] = static_cast<float>(sums.second * grad_scale);
  }
};

}  // namespace qat::cuda
