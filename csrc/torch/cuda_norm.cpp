// The operators of norm.cpp on the GPU: everything by channel stays there, and the host never waits.
#include <torch/csrc/stable/library.h>

#include "cuda_norm.h"

namespace qat::ops::gpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Device& device, const Tensor& x, const BatchNorm& norm,
                                                        qat::Range bounds, const Quantizer& quantizer, bool with_mask) {
  const OptionalTensor &running_mean = norm.running_mean, &running_var = norm.running_var;
  const bool batch_statistics = norm.batch_statistics;
  check_float(x, "x", device.index);
  check(x.dim() >= 2 && x.numel() > 0,
        "x of shape " + shape_of(x) + " has no channels or no elements; give (N, C, ...)");
  const int64_t channels = x.size(1);
  const OptionalTensor weight = by_channel(norm.gamma, "gamma", channels, device.index);
  const OptionalTensor bias = by_channel(norm.beta, "beta", channels, device.index);
  check(batch_statistics || (running_mean.has_value() && running_var.has_value()),
        "running_mean or running_var is missing; give them, or take the statistics of the batch");
  if (running_mean) check_state(*running_mean, "running_mean", ScalarType::Float, channels, device.index);
  if (running_var) check_state(*running_var, "running_var", ScalarType::Float, channels, device.index);
  check(!batch_statistics || x.numel() > channels,
        "x of shape " + shape_of(x) + " has one value a channel; batch norm needs more");

  const Tensor y = torch::stable::empty_like(x), bits = new_bits(x, with_mask);
  const Tensor mean = new_cuda(x, {channels}, ScalarType::Float), invstd = new_cuda(x, {channels}, ScalarType::Float);
  const Tensor line = new_cuda(x, {2, channels}, ScalarType::Float);
  const ExtremaTensors extrema = new_extrema(x, 1, device.stream);
  float* const factor = line.mutable_data_ptr<float>();
  const qat::cuda::NormLines lines{mean.mutable_data_ptr<float>(), invstd.mutable_data_ptr<float>(), factor,
                                   factor + channels, extrema.out().low, extrema.out().high};
  const qat::cuda::NormParameters parameters{read(weight), read(bias), write(running_mean), write(running_var),
                                             norm.momentum, norm.eps};
  const Tensor from = dense(x, y);
  const float* const data = from.const_data_ptr<float>();
  const qat::Layout layout = layout_of(from, 1);
  if (batch_statistics) {
    const Tensor scratch = new_cuda(x, {qat::cuda::reduction_scratch(layout)}, ScalarType::Byte);
    check_launch(qat::cuda::batch_lines(data, layout, parameters, lines, scratch.mutable_data_ptr(), device.stream),
                 "batch statistics");
  } else {
    check_launch(qat::cuda::frozen_lines(channels, parameters, lines, device.stream), "frozen statistics");
  }
  if (quantizer.tracks) {
    if (!batch_statistics) {
      check_launch(qat::cuda::observe_extrema<float>(data, layout, extrema.out(), device.stream), "observe_extrema");
    }
    check_launch(qat::cuda::track_lines(lines.low, lines.high, lines.factor, lines.shift, extrema.out().nonfinite,
                                        channels, bounds, x.size(0), quantizer.tracking, device.stream),
                 "track_lines");
  }
  check_launch(qat::cuda::norm_apply(data, y.mutable_data_ptr<float>(), bits_or_null(bits, with_mask), layout,
                                     lines.factor, lines.shift, quantizer.steps, device.stream),
               "norm_quantize_forward");
  return {y, bits, mean, invstd};
}

std::tuple<Tensor, Tensor> add_forward(const Device& device, const Tensor& x, const Tensor& other, qat::Range bounds,
                                       const Quantizer& quantizer, bool with_mask) {
  check_float(x, "x", device.index);
  check_float(other, "other", device.index);
  check(sizes_of(x) == sizes_of(other),
        "other of shape " + shape_of(other) + " is added to x of shape " + shape_of(x) + "; give tensors of one shape");
  const Tensor y = torch::stable::empty_like(x), bits = new_bits(x, with_mask);
  const int64_t n = x.numel();
  if (n == 0) return {y, bits};
  const Tensor from = dense(x, y), second = in_order_of(other, from);
  const float *const left = from.const_data_ptr<float>(), *const right = second.const_data_ptr<float>();
  if (quantizer.tracks) {
    const ExtremaTensors extrema = new_extrema(x, -1, device.stream);
    const qat::ExtremaOut found = extrema.out();
    check_launch(qat::cuda::add_extrema(left, right, n, found, device.stream), "add_extrema");
    check_launch(qat::cuda::track_lines(found.low, found.high, nullptr, nullptr, found.nonfinite, 1, bounds,
                                        rows_of(x), quantizer.tracking, device.stream),
                 "track_lines");
  }
  check_launch(qat::cuda::add_apply(left, right, y.mutable_data_ptr<float>(), bits_or_null(bits, with_mask), n,
                                    quantizer.steps, device.stream),
               "add_quantize_forward");
  return {y, bits};
}

NormBackward::NormBackward(const Device& device, const Tensor& grad, const Saved& saved, bool with_sums) {
  const Tensor &x = saved.x, &mask_bits = saved.mask_bits;
  check_float(grad, "grad", device.index);
  check_float(x, "x", device.index);
  check(sizes_of(grad) == sizes_of(x) && x.dim() >= 2 && x.numel() > 0,
        "grad of shape " + shape_of(grad) + " does not fit x of shape " + shape_of(x) +
            "; give those of one forward pass");
  check_cuda(mask_bits, "mask_bits", device.index);
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() &&
            mask_bits.numel() == (x.numel() + 7) / 8,
        "mask_bits does not fit x of shape " + shape_of(x) +
            "; give what the forward pass returned with with_mask=True");
  const int64_t channels = x.size(1);
  weight = by_channel(saved.gamma, "gamma", channels, device.index);
  means = by_channel(saved.mean, "mean", channels, device.index);
  inverses = by_channel(saved.invstd, "invstd", channels, device.index);
  dx = torch::stable::empty_like(x);
  from = dense(x, dx);
  given = in_order_of(grad, from);  // the bits are in the order of memory of x
  layout = layout_of(from, 1);
  dgamma = new_cuda(x, {with_sums ? channels : 0}, ScalarType::Float);
  dbeta = new_cuda(x, {with_sums ? channels : 0}, ScalarType::Float);
  lines = new_cuda(x, {3, channels}, ScalarType::Float);
  scratch = new_cuda(x, {with_sums ? qat::cuda::reduction_scratch(layout) : 0}, ScalarType::Byte);
  float* const factor = lines.mutable_data_ptr<float>();
  slopes = {read(weight),
            read(means),
            read(inverses),
            factor,
            saved.batch_statistics ? factor + channels : nullptr,
            saved.batch_statistics ? factor + 2 * channels : nullptr,
            with_sums ? dgamma.mutable_data_ptr<float>() : nullptr,
            with_sums ? dbeta.mutable_data_ptr<float>() : nullptr};
}

}  // namespace qat::ops::gpu

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize_forward(
    Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var,
    bool batch_statistics, double momentum, double eps, double low_bound, double high_bound, OptionalTensor low,
    OptionalTensor high, OptionalTensor scale, OptionalTensor zero_point, OptionalTensor tracked, bool track,
    double average, int64_t qmin, int64_t qmax, bool symmetric, int64_t middle, bool power_of_two, bool with_mask,
    OptionalTensor seed, double drop) {
  const Device device(x);
  const qat::Range bounds = bounds_of(low_bound, high_bound);
  Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax,
                      {qmin, qmax, symmetric, middle, power_of_two}, bounds, device);
  quantizer.steps.drop = drop_or_none(seed, drop);
  return norm_forward(device, x, {gamma, beta, running_mean, running_var, batch_statistics, momentum, eps}, bounds,
                      quantizer, with_mask);
}

std::tuple<Tensor, Tensor, Tensor> norm_quantize_backward(Tensor grad, Tensor x, Tensor mask_bits, OptionalTensor gamma,
                                                          Tensor mean, Tensor invstd, bool batch_statistics,
                                                          bool with_parameters) {
  const Device device(x);
  const bool sums = with_parameters || batch_statistics;
  const NormBackward b(device, grad, {x, mask_bits, gamma, mean, invstd, batch_statistics}, sums);
  check_launch(qat::cuda::norm_backward(b.from.const_data_ptr<float>(), b.given.const_data_ptr<float>(),
                                        mask_bits.const_data_ptr<uint8_t>(), b.layout, b.slopes,
                                        b.dx.mutable_data_ptr<float>(), sums ? b.scratch.mutable_data_ptr() : nullptr,
                                        device.stream),
               "norm_quantize_backward");
  return {b.dx, b.dgamma, b.dbeta};
}

std::tuple<Tensor, Tensor> add_quantize_forward(Tensor x, Tensor other, double low_bound, double high_bound,
                                                OptionalTensor low, OptionalTensor high, OptionalTensor scale,
                                                OptionalTensor zero_point, OptionalTensor tracked, bool track,
                                                double average, int64_t qmin, int64_t qmax, bool symmetric,
                                                int64_t middle, bool power_of_two, bool with_mask,
                                                OptionalTensor seed, double drop) {
  const Device device(x);
  const qat::Range bounds = bounds_of(low_bound, high_bound);
  Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax,
                      {qmin, qmax, symmetric, middle, power_of_two}, bounds, device);
  quantizer.steps.drop = drop_or_none(seed, drop);
  return add_forward(device, x, other, bounds, quantizer, with_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("norm_quantize_forward", TORCH_BOX(&norm_quantize_forward));
  m.impl("norm_quantize_backward", TORCH_BOX(&norm_quantize_backward));
  m.impl("add_quantize_forward", TORCH_BOX(&add_quantize_forward));
}
