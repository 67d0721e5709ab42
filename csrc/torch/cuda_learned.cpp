// The operators of learned.cpp on the GPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_learned.h"
#include "cuda_weight.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

// grad_scale and clips are for the gradient only, which is registered in Python.
Tensor fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                     int64_t axis, double, bool) {
  const Device device(x);
  check_values(x, "x", device.index);
  const LearnedGrid g = learned_grid(x, scale, zero_point, qmin, qmax, axis, device.stream);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Tensor from = dense(x, y);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::fake_quantize<T>(static_cast<const T*>(from.const_data_ptr()),
                                             static_cast<T*>(y.mutable_data_ptr()), nullptr, layout_of(from, axis),
                                             g.scale.const_data_ptr<float>(), g.zero_point.const_data_ptr<float>(),
                                             g.range, {}, device.stream),
                 "fake_quantize_learned_forward");
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Tensor zero_point, int64_t qmin, int64_t qmax,
                                                                  int64_t axis, double grad_scale,
                                                                  bool clips) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_values(grad, "grad", device.index);
  check(grad.scalar_type() == x.scalar_type() && sizes_of(grad) == sizes_of(x),
        "grad has shape " + shape_of(grad) + " and x " + shape_of(x) + "; give a gradient of the shape and type of x");
  const LearnedGrid g = learned_grid(x, scale, zero_point, qmin, qmax, axis, device.stream);
  const Tensor dx = torch::stable::empty_like(x);
  Tensor ds = new_cuda(x, sizes_of(scale), ScalarType::Float), dz = new_cuda(x, sizes_of(zero_point), ScalarType::Float);
  if (x.numel() == 0) return {dx, torch::stable::fill_(ds, 0.0), torch::stable::fill_(dz, 0.0)};
  const Tensor from = dense(x, dx), gradient = in_order_of(grad, from);
  const qat::Layout layout = layout_of(from, axis);
  const Tensor scratch = new_cuda(x, {qat::cuda::reduction_scratch(layout)}, ScalarType::Byte);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::learned_backward<T>(
                     static_cast<const T*>(from.const_data_ptr()), static_cast<const T*>(gradient.const_data_ptr()),
                     static_cast<T*>(dx.mutable_data_ptr()), layout, g.scale.const_data_ptr<float>(),
                     g.zero_point.const_data_ptr<float>(), g.range, clips, grad_scale, ds.mutable_data_ptr<float>(),
                     dz.mutable_data_ptr<float>(), scratch.mutable_data_ptr(), device.stream),
                 "fake_quantize_learned_backward");
  });
  return {dx, ds, dz};
}

// The factor comes too: the statistics will have moved when the gradient wants it. grad_scale is for the gradient only,
// which is registered in Python.
std::tuple<Tensor, Tensor> fake_quantize_weight_learned_forward(Tensor weight, Tensor scale, Tensor zero_point,
                                                                OptionalTensor gamma, Tensor var, double eps,
                                                                double gamma_floor, int64_t qmin, int64_t qmax,
                                                                int64_t axis, int64_t channel_axis, int64_t groups,
                                                                double) {
  const Device device(weight);
  check_values(weight, "weight", device.index);
  const LearnedGrid g = learned_grid(weight, scale, zero_point, qmin, qmax, axis, device.stream);
  const int64_t outputs = outputs_of(weight, channel_axis, groups);
  const WeightNorm norm(gamma, var, outputs, device.index);
  const Tensor kept = new_cuda(weight, {outputs}, ScalarType::Float);
  const Tensor y = torch::stable::empty_like(weight);
  const Tensor from = dense(weight, y);
  const qat::cuda::BatchNorm factor = norm.factor(eps, gamma_floor, channel_map(from, channel_axis, groups));
  check_launch(qat::cuda::weight_factors(factor, outputs, kept.mutable_data_ptr<float>(), device.stream),
               "weight_factors");
  const int64_t n = from.numel();
  if (n == 0) return {y, kept};
  // in the order of the memory of the weight
  const Tensor folded = new_cuda(weight, {n}, ScalarType::Float);
  float* const values = folded.mutable_data_ptr<float>();
  by_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::fold_weight<T>(static_cast<const T*>(from.const_data_ptr()), n, factor, values,
                                           device.stream),
                 "fold_weight");
    check_launch(qat::cuda::fake_quantize<float>(values, values, nullptr, layout_of(from, axis),
                                                 g.scale.const_data_ptr<float>(), g.zero_point.const_data_ptr<float>(),
                                                 g.range, {}, device.stream),
                 "fake_quantize_weight_learned_forward");
    check_launch(qat::cuda::unfold_weight<T>(values, n, factor, static_cast<T*>(y.mutable_data_ptr()), device.stream),
                 "unfold_weight");
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_weight_learned_backward(
    Tensor grad, Tensor weight, Tensor scale, Tensor zero_point, Tensor factor, int64_t qmin, int64_t qmax,
    int64_t axis, int64_t channel_axis, int64_t groups, double grad_scale, bool with_zero_point) {
  const Device device(weight);
  check_values(weight, "weight", device.index);
  check_values(grad, "grad", device.index);
  check(grad.scalar_type() == weight.scalar_type() && sizes_of(grad) == sizes_of(weight),
        "grad has shape " + shape_of(grad) + " and weight " + shape_of(weight) +
            "; give a gradient of the shape and type of the weight");
  const LearnedGrid g = learned_grid(weight, scale, zero_point, qmin, qmax, axis, device.stream);
  const Tensor values = norm_values(factor, "factor", outputs_of(weight, channel_axis, groups), device.index);
  const Tensor dw = torch::stable::empty_like(weight);
  Tensor ds = new_cuda(weight, sizes_of(scale), ScalarType::Float),
         dz = new_zero_point_gradient(weight, zero_point, with_zero_point);
  if (weight.numel() == 0) return {dw, torch::stable::fill_(ds, 0.0), torch::stable::fill_(dz, 0.0)};
  const Tensor from = dense(weight, dw), gradient = in_order_of(grad, from);
  const qat::Layout layout = layout_of(from, axis);
  const qat::cuda::Factors factors{values.const_data_ptr<float>(), channel_map(from, channel_axis, groups)};
  const Tensor scratch = new_cuda(weight, {qat::cuda::reduction_scratch(layout)}, ScalarType::Byte);
  by_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::learned_weight_backward<T>(
                     static_cast<const T*>(from.const_data_ptr()), static_cast<const T*>(gradient.const_data_ptr()),
                     static_cast<T*>(dw.mutable_data_ptr()), layout, g.scale.const_data_ptr<float>(),
                     g.zero_point.const_data_ptr<float>(), g.range, factors, grad_scale, ds.mutable_data_ptr<float>(),
                     write_if(dz, with_zero_point), scratch.mutable_data_ptr(), device.stream),
                 "fake_quantize_weight_learned_backward");
  });
  return {dw, ds, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("fake_quantize_learned_forward", TORCH_BOX(&fake_quantize_learned_forward));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
  m.impl("fake_quantize_weight_learned_forward", TORCH_BOX(&fake_quantize_weight_learned_forward));
  m.impl("fake_quantize_weight_learned_backward", TORCH_BOX(&fake_quantize_weight_learned_backward));
}
