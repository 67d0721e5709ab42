// Registration of fake quantization on learned grids.
#include "../kernels/learned.h"

#include <cmath>

#include "tensors.h"

namespace {

using namespace qat::ops;

struct LearnedGrid {
  std::vector<float> scale, zero_point;
  qat::Range range;
};

// A learned zero point is any number; the grid has the nearest code.
LearnedGrid grid(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax,
                 int64_t axis) {
  check_axis(x, axis);
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  LearnedGrid made{grid_values(scale, "scale", count, x), grid_values(zero_point, "zero_point", count, x),
                   code_range(qmin, qmax)};
  for (float& z : made.zero_point) z = std::min(std::max(std::nearbyint(z), made.range.low), made.range.high);
  return made;
}

// grad_scale is for the gradient only, which is registered in Python.
Tensor fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                     int64_t axis, double) {
  check_values(x, "x");
  const LearnedGrid g = grid(x, scale, zero_point, qmin, qmax, axis);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Tensor from = dense(x, y);
  const qat::Layout layout = layout_of(from, axis);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::fake_quantize<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()),
                          static_cast<T*>(y.mutable_data_ptr()), nullptr, layout, g.scale.data(), g.zero_point.data(),
                          g.range, nullptr);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Tensor zero_point, int64_t qmin, int64_t qmax,
                                                                  int64_t axis, double grad_scale) {
  check_values(x, "x");
  check_values(grad, "grad");
  check(grad.scalar_type() == x.scalar_type() && shape_of(grad) == shape_of(x),
        "grad has shape " + shape_of(grad) + " and x " + shape_of(x) + "; give a gradient of the shape and type of x");
  const LearnedGrid g = grid(x, scale, zero_point, qmin, qmax, axis);
  Tensor dx = torch::stable::empty_like(x), ds = new_cpu(sizes_of(scale), ScalarType::Float),
         dz = new_cpu(sizes_of(zero_point), ScalarType::Float);
  const size_t count = g.scale.size();
  std::vector<double> scales(count), zero_points(count);
  if (x.numel() > 0) {
    const Tensor from = dense(x, dx);
    const Tensor gradient = in_order_of(grad, from);
    const qat::Layout layout = layout_of(from, axis);
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      qat::learned_gradient<T>(kernels(), parallel, static_cast<const T*>(gradient.const_data_ptr()),
                               static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()),
                               layout, g.scale.data(), g.zero_point.data(), g.range,
                               {scales.data(), zero_points.data()});
    });
  }
  const auto rounded = [&](double sum) { return static_cast<float>(sum * grad_scale); };
  std::transform(scales.begin(), scales.end(), ds.mutable_data_ptr<float>(), rounded);
  std::transform(zero_points.begin(), zero_points.end(), dz.mutable_data_ptr<float>(), rounded);
  return {dx, ds, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int axis=-1, "
        "float grad_scale=1.0) -> Tensor");
  m.def("fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, "
        "int axis=-1, float grad_scale=1.0) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("fake_quantize_learned_forward", TORCH_BOX(&fake_quantize_learned_forward));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
}
