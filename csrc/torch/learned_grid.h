// A learned grid as the kernels want it.
#pragma once

#include <cmath>

#include "tensors.h"

namespace qat::ops {

struct LearnedGrid {
  std::vector<float> scale, zero_point;
  qat::Range range;
};

// A learned zero point is any number; the grid has the nearest code.
inline LearnedGrid learned_grid(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                int64_t qmax, int64_t axis) {
  check_axis(x, axis);
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  LearnedGrid made{grid_values(scale, "scale", count, x), grid_values(zero_point, "zero_point", count, x),
                   code_range(qmin, qmax)};
  for (float& z : made.zero_point) z = std::min(std::max(std::nearbyint(z), made.range.low), made.range.high);
  return made;
}

// The gradient of a scale or a zero point, from its sums by channel.
inline void write_sums(const std::vector<double>& sums, double grad_scale, const Tensor& to) {
  std::transform(sums.begin(), sums.end(), to.mutable_data_ptr<float>(),
                 [&](double sum) { return static_cast<float>(sum * grad_scale); });
}

}  // namespace qat::ops
