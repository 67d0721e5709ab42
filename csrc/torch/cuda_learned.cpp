// The operators of learned.cpp on the GPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

struct LearnedGrid {
  Tensor scale, zero_point;  // float32, codes
  qat::Range range;
};

LearnedGrid grid(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax,
                 int64_t axis, cudaStream_t stream) {
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

// grad_scale is for the gradient only, which is registered in Python.
Tensor fake_quantize_learned_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                     int64_t axis, double) {
  const Device device(x);
  check_values(x, "x", device.index);
  const LearnedGrid g = grid(x, scale, zero_point, qmin, qmax, axis, device.stream);
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
                                                                  int64_t axis, double grad_scale) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_values(grad, "grad", device.index);
  check(grad.scalar_type() == x.scalar_type() && sizes_of(grad) == sizes_of(x),
        "grad has shape " + shape_of(grad) + " and x " + shape_of(x) + "; give a gradient of the shape and type of x");
  const LearnedGrid g = grid(x, scale, zero_point, qmin, qmax, axis, device.stream);
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
                     g.zero_point.const_data_ptr<float>(), g.range, grad_scale, ds.mutable_data_ptr<float>(),
                     dz.mutable_data_ptr<float>(), scratch.mutable_data_ptr(), device.stream),
                 "fake_quantize_learned_backward");
  });
  return {dx, ds, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("fake_quantize_learned_forward", TORCH_BOX(&fake_quantize_learned_forward));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
}
