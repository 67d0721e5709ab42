// The operators of norm_learned.cpp on the GPU.
#include <torch/csrc/stable/library.h>

#include "cuda_learned.h"
#include "cuda_norm.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

struct Learned {
  Learned(const Tensor& x, double low_bound, double high_bound, const Tensor& scale, const Tensor& zero_point,
          int64_t qmin, int64_t qmax, bool clips, const OptionalTensor& seed, double drop, const Device& device)
      : grid(learned_grid(x, scale, zero_point, qmin, qmax, -1, device.stream)),
        code(torch::stable::to(grid.zero_point, ScalarType::Int)),
        steps{bounds_of(low_bound, high_bound), grid.scale.const_data_ptr<float>(), code.const_data_ptr<int32_t>(),
              grid.range, clips, drop_or_none(seed, drop)} {}

  LearnedGrid grid;
  Tensor code;
  qat::cuda::StepsOnDevice steps;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize_learned_forward(
    Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var,
    bool batch_statistics, double momentum, double eps, double low_bound, double high_bound, Tensor scale,
    Tensor zero_point, int64_t qmin, int64_t qmax, bool with_mask, bool clips, OptionalTensor seed, double drop) {
  const Device device(x);
  const Learned learned(x, low_bound, high_bound, scale, zero_point, qmin, qmax, clips, seed, drop, device);
  return norm_forward(device, x, {gamma, beta, running_mean, running_var, batch_statistics, momentum, eps},
                      learned.steps.bounds, Quantizer(learned.steps), with_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_quantize_learned_backward(
    Tensor grad, Tensor x, Tensor mask_bits, OptionalTensor gamma, OptionalTensor beta, Tensor mean, Tensor invstd,
    bool batch_statistics, double low_bound, double high_bound, Tensor scale, Tensor zero_point, int64_t qmin,
    int64_t qmax, double grad_scale, bool with_zero_point, bool clips, OptionalTensor seed, double drop) {
  const Device device(x);
  const NormBackward b(device, grad, {x, mask_bits, gamma, mean, invstd, batch_statistics}, true);
  const Learned learned(x, low_bound, high_bound, scale, zero_point, qmin, qmax, clips, seed, drop, device);
  const int64_t channels = x.size(1);
  const OptionalTensor bias = by_channel(beta, "beta", channels, device.index);
  const Tensor ds = new_cuda(x, sizes_of(scale), ScalarType::Float),
               dz = new_zero_point_gradient(x, zero_point, with_zero_point);
  const Tensor shift = new_cuda(x, {channels}, ScalarType::Float),
               sums = new_cuda(x, {2, channels}, ScalarType::Double);
  const qat::cuda::GridGradient of_grid{grad_scale, sums.mutable_data_ptr<double>(), ds.mutable_data_ptr<float>(),
                                        write_if(dz, with_zero_point)};
  check_launch(qat::cuda::norm_learned_backward(b.from.const_data_ptr<float>(), b.given.const_data_ptr<float>(),
                                                mask_bits.const_data_ptr<uint8_t>(), b.layout, b.slopes, read(bias),
                                                shift.mutable_data_ptr<float>(), learned.steps, of_grid,
                                                b.dx.mutable_data_ptr<float>(), b.scratch.mutable_data_ptr(),
                                                device.stream),
               "norm_quantize_learned_backward");
  return {b.dx, b.dgamma, b.dbeta, ds, dz};
}

// grad_scale is for the gradient only, which is registered in Python.
Tensor add_quantize_learned_forward(Tensor x, Tensor other, double low_bound, double high_bound, Tensor scale,
                                    Tensor zero_point, int64_t qmin, int64_t qmax, double, bool clips,
                                    OptionalTensor seed, double drop) {
  const Device device(x);
  const Learned learned(x, low_bound, high_bound, scale, zero_point, qmin, qmax, clips, seed, drop, device);
  return std::get<0>(add_forward(device, x, other, learned.steps.bounds, Quantizer(learned.steps), false));
}

std::tuple<Tensor, Tensor, Tensor> add_quantize_learned_backward(Tensor grad, Tensor x, Tensor other, double low_bound,
                                                                 double high_bound, Tensor scale, Tensor zero_point,
                                                                 int64_t qmin, int64_t qmax, double grad_scale,
                                                                 bool with_zero_point, bool clips,
                                                                 OptionalTensor seed, double drop) {
  const Device device(x);
  check_float(grad, "grad", device.index);
  check_float(x, "x", device.index);
  check_float(other, "other", device.index);
  check(sizes_of(x) == sizes_of(other) && sizes_of(x) == sizes_of(grad),
        "grad of shape " + shape_of(grad) + " and other of shape " + shape_of(other) + " do not fit x of shape " +
            shape_of(x) + "; give those of one forward pass");
  const Learned learned(x, low_bound, high_bound, scale, zero_point, qmin, qmax, clips, seed, drop, device);
  const Tensor dx = torch::stable::empty_like(x);
  Tensor ds = new_cuda(x, sizes_of(scale), ScalarType::Float),
         dz = new_zero_point_gradient(x, zero_point, with_zero_point);
  const int64_t n = x.numel();
  if (n == 0) return {dx, torch::stable::fill_(ds, 0.0), torch::stable::fill_(dz, 0.0)};
  const Tensor from = dense(x, dx), second = in_order_of(other, from), gradient = in_order_of(grad, from);
  const Tensor scratch = new_cuda(x, {qat::cuda::reduction_scratch({1, 1, n})}, ScalarType::Byte);
  const qat::cuda::GridGradient of_grid{grad_scale, nullptr, ds.mutable_data_ptr<float>(),
                                        write_if(dz, with_zero_point)};
  check_launch(qat::cuda::add_learned_backward(from.const_data_ptr<float>(), second.const_data_ptr<float>(),
                                               gradient.const_data_ptr<float>(), n, learned.steps, of_grid,
                                               dx.mutable_data_ptr<float>(), scratch.mutable_data_ptr(), device.stream),
               "add_quantize_learned_backward");
  return {dx, ds, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("norm_quantize_learned_forward", TORCH_BOX(&norm_quantize_learned_forward));
  m.impl("norm_quantize_learned_backward", TORCH_BOX(&norm_quantize_learned_backward));
  m.impl("add_quantize_learned_forward", TORCH_BOX(&add_quantize_learned_forward));
  m.impl("add_quantize_learned_backward", TORCH_BOX(&add_quantize_learned_backward));
}
