// A learned grid on the device, as the kernels want it.
#pragma once

#include "cuda.h"

namespace qat::ops::gpu {

struct LearnedGrid {
  Tensor scale, zero_point;  // float32, codes
  qat::Range range;
};

inline LearnedGrid learned_grid(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                int64_t qmax, int64_t axis, cudaStream_t stream) {
  check_axis(x, axis);
  const int64_t count = channels_of(x, axis);
  const Tensor given = grid_values(zero_point, "zero_point", count, x);
  const LearnedGrid made{grid_values(scale, "scale", count, x), new_cuda(x, {count}, ScalarType::Float),
                         code_range(qmin, qmax)};
  check_launch(qat::cuda::nearest_codes(given.const_data_ptr<float>(), count, made.range,
                                        made.zero_point.mutable_data_ptr<float>(), stream),
               "fake_quantize_learned");
  return made;
}

// Where the gradient of a zero point goes; empty, and null, where it is not wanted.
inline Tensor new_zero_point_gradient(const Tensor& x, const Tensor& zero_point, bool wanted) {
  return new_cuda(x, wanted ? sizes_of(zero_point) : std::vector<int64_t>{0}, ScalarType::Float);
}

inline float* write_if(const Tensor& to, bool wanted) { return wanted ? to.mutable_data_ptr<float>() : nullptr; }

}  // namespace qat::ops::gpu
