// Registration of fake quantization on learned grids.
#include "../kernels/learned.h"

#include "learned_grid.h"
#include "weight_factor.h"

namespace {

using namespace qat::ops;

// grad_scale and clips are for the gradient only, which is registered in Python.
Tensor fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                     int64_t axis, double, bool) {
  check_values(x, "x");
  const LearnedGrid g = learned_grid(x, scale, zero_point, qmin, qmax, axis);
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
                                                                  int64_t axis, double grad_scale,
                                                                  bool clips) {
  check_values(x, "x");
  check_values(grad, "grad");
  check(grad.scalar_type() == x.scalar_type() && shape_of(grad) == shape_of(x),
        "grad has shape " + shape_of(grad) + " and x " + shape_of(x) + "; give a gradient of the shape and type of x");
  const LearnedGrid g = learned_grid(x, scale, zero_point, qmin, qmax, axis);
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
                               {scales.data(), zero_points.data()}, clips);
    });
  }
  write_sums(scales, grad_scale, ds);
  write_sums(zero_points, grad_scale, dz);
  return {dx, ds, dz};
}

// The factor comes too: the statistics will have moved when the gradient wants it. grad_scale is for the gradient only,
// which is registered in Python.
std::tuple<Tensor, Tensor> fake_quantize_weight_learned_forward(Tensor weight, Tensor scale, Tensor zero_point,
                                                                OptionalTensor gamma, Tensor var, double eps,
                                                                double gamma_floor, int64_t qmin, int64_t qmax,
                                                                int64_t axis, int64_t channel_axis, int64_t groups,
                                                                double) {
  check_values(weight, "weight");
  LearnedGrid g = learned_grid(weight, scale, zero_point, qmin, qmax, axis);
  const int64_t outputs = outputs_of(weight, channel_axis, groups);
  const std::vector<float> values = batch_norm_factor(gamma, var, eps, gamma_floor, outputs);
  const Tensor kept = new_cpu({outputs}, ScalarType::Float);
  std::copy(values.begin(), values.end(), kept.mutable_data_ptr<float>());
  Tensor y = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return {y, kept};
  const Tensor from = dense(weight, y);
  const WeightFactor factor(from, values, channel_axis, groups);
  by_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::fake_quantize_weight<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()),
                                 static_cast<T*>(y.mutable_data_ptr()), nullptr, layout_of(from, axis), &factor.factor,
                                 g.scale.data(), g.zero_point.data(), nullptr, g.range);
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_weight_learned_backward(
    Tensor grad, Tensor weight, Tensor scale, Tensor zero_point, Tensor factor, int64_t qmin, int64_t qmax,
    int64_t axis, int64_t channel_axis, int64_t groups, double grad_scale, bool with_zero_point) {
  check_values(weight, "weight");
  check_values(grad, "grad");
  check(grad.scalar_type() == weight.scalar_type() && shape_of(grad) == shape_of(weight),
        "grad has shape " + shape_of(grad) + " and weight " + shape_of(weight) +
            "; give a gradient of the shape and type of the weight");
  const LearnedGrid g = learned_grid(weight, scale, zero_point, qmin, qmax, axis);
  const std::vector<float> values = float_values(factor, "factor", outputs_of(weight, channel_axis, groups));
  Tensor dw = torch::stable::empty_like(weight), ds = new_cpu(sizes_of(scale), ScalarType::Float),
         dz = new_cpu(with_zero_point ? sizes_of(zero_point) : std::vector<int64_t>{0}, ScalarType::Float);
  const size_t count = g.scale.size();
  std::vector<double> scales(count), zero_points(with_zero_point ? count : 0);
  if (weight.numel() > 0) {
    const Tensor from = dense(weight, dw), gradient = in_order_of(grad, from);
    const WeightFactor spread(from, values, channel_axis, groups);
    by_type(weight, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      qat::learned_weight_gradient<T>(
          kernels(), parallel, static_cast<const T*>(gradient.const_data_ptr()),
          static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(dw.mutable_data_ptr()), layout_of(from, axis),
          spread.factor, g.scale.data(), g.zero_point.data(), g.range,
          {scales.data(), with_zero_point ? zero_points.data() : nullptr});
    });
  }
  write_sums(scales, grad_scale, ds);
  write_sums(zero_points, grad_scale, dz);
  return {dw, ds, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int axis=-1, "
        "float grad_scale=1.0, bool clips=False) -> Tensor");
  m.def("fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, "
        "int axis=-1, float grad_scale=1.0, bool clips=False) -> (Tensor, Tensor, Tensor)");
  m.def("fake_quantize_weight_learned_forward(Tensor weight, Tensor scale, Tensor zero_point, Tensor? gamma, "
        "Tensor var, float eps, float gamma_floor, int qmin, int qmax, int axis, int channel_axis=0, int groups=1, "
        "float grad_scale=1.0) -> (Tensor, Tensor)");
  m.def("fake_quantize_weight_learned_backward(Tensor grad, Tensor weight, Tensor scale, Tensor zero_point, "
        "Tensor factor, int qmin, int qmax, int axis, int channel_axis=0, int groups=1, "
        "float grad_scale=1.0, bool with_zero_point=True) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("fake_quantize_learned_forward", TORCH_BOX(&fake_quantize_learned_forward));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
  m.impl("fake_quantize_weight_learned_forward", TORCH_BOX(&fake_quantize_weight_learned_forward));
  m.impl("fake_quantize_weight_learned_backward", TORCH_BOX(&fake_quantize_weight_learned_backward));
}
