// The operators of norm.cpp on the GPU: everything by channel stays there, and the host never waits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

void check_float(const Tensor& x, const char* name, int32_t device) {
  check_cuda(x, name, device);
  check(x.scalar_type() == ScalarType::Float,
        std::string(name) + " is not float32; convert it, or use the PyTorch path");
}

// Contiguous; none stays none.
OptionalTensor by_channel(const OptionalTensor& given, const char* name, int64_t count, int32_t device) {
  if (!given.has_value()) return std::nullopt;
  check_float(*given, name, device);
  check(given->numel() == count, std::to_string(given->numel()) + " values in " + name + " for " +
                                     std::to_string(count) + " channels; give the batch norm's");
  return torch::stable::contiguous(*given);
}

const float* read(const OptionalTensor& given) { return given ? given->const_data_ptr<float>() : nullptr; }
float* write(const OptionalTensor& given) { return given ? given->mutable_data_ptr<float>() : nullptr; }

// The quantizer of the result: its buffers, and how it follows the batches.
struct Quantizer {
  Quantizer(const OptionalTensor& low, const OptionalTensor& high, const OptionalTensor& scale,
            const OptionalTensor& zero_point, const OptionalTensor& tracked, bool track, double momentum, int64_t qmin,
            int64_t qmax, const qat::GridRule& rule, qat::Range bounds, const Device& device)
      : quantizes(scale.has_value()), tracks(track), steps{bounds, nullptr, nullptr, {0.0f, 1.0f}} {
    check(!track || quantizes, "track is set without a scale; give the quantizer's buffers");
    if (!quantizes) return;
    steps.codes = code_range(qmin, qmax);
    check(low.has_value() && high.has_value() && zero_point.has_value() && tracked.has_value(),
          "scale is given without low, high, zero_point or tracked; give the quantizer's buffers");
    const Buffers buffers{*low, *high, *scale, *zero_point, *tracked};
    buffers.check(1, device.index);
    tracking = buffers.tracking(momentum, rule);
    steps.scale = tracking.state.scale;
    steps.zero_point = tracking.state.zero_point;
  }

  bool quantizes, tracks;
  qat::cuda::StepsOnDevice steps;
  qat::cuda::Tracking tracking{};
};

qat::Range float_range(double low, double high) { return {static_cast<float>(low), static_cast<float>(high)}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize_forward(
    Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var,
    bool batch_statistics, double momentum, double eps, double low_bound, double high_bound, OptionalTensor low,
    OptionalTensor high, OptionalTensor scale, OptionalTensor zero_point, OptionalTensor tracked, bool track,
    double average, int64_t qmin, int64_t qmax, bool symmetric, int64_t middle, bool power_of_two, bool with_mask) {
  const Device device(x);
  check_float(x, "x", device.index);
  check(x.dim() >= 2 && x.numel() > 0,
        "x of shape " + shape_of(x) + " has no channels or no elements; give (N, C, ...)");
  const qat::Range bounds = float_range(low_bound, high_bound);
  const Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax,
                            {qmin, qmax, symmetric, middle, power_of_two}, bounds, device);
  const int64_t channels = x.size(1);
  const OptionalTensor weight = by_channel(gamma, "gamma", channels, device.index);
  const OptionalTensor bias = by_channel(beta, "beta", channels, device.index);
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
                                             momentum, eps};
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

std::tuple<Tensor, Tensor, Tensor> norm_quantize_backward(Tensor grad, Tensor x, Tensor mask_bits, OptionalTensor gamma,
                                                          Tensor mean, Tensor invstd, bool batch_statistics,
                                                          bool with_parameters) {
  const Device device(x);
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
  const OptionalTensor weight = by_channel(gamma, "gamma", channels, device.index);
  const OptionalTensor means = by_channel(mean, "mean", channels, device.index);
  const OptionalTensor inverses = by_channel(invstd, "invstd", channels, device.index);
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor from = dense(x, dx), given = in_order_of(grad, from);  // the bits are in the order of memory of x
  const qat::Layout layout = layout_of(from, 1);
  const bool sums = with_parameters || batch_statistics;
  const Tensor dgamma = new_cuda(x, {sums ? channels : 0}, ScalarType::Float),
               dbeta = new_cuda(x, {sums ? channels : 0}, ScalarType::Float);
  const Tensor lines = new_cuda(x, {3, channels}, ScalarType::Float);
  float* const factor = lines.mutable_data_ptr<float>();
  const qat::cuda::NormSlopes slopes{read(weight),
                                     read(means),
                                     read(inverses),
                                     factor,
                                     batch_statistics ? factor + channels : nullptr,
                                     batch_statistics ? factor + 2 * channels : nullptr,
                                     sums ? dgamma.mutable_data_ptr<float>() : nullptr,
                                     sums ? dbeta.mutable_data_ptr<float>() : nullptr};
  const Tensor scratch = new_cuda(x, {sums ? qat::cuda::reduction_scratch(layout) : 0}, ScalarType::Byte);
  check_launch(qat::cuda::norm_backward(from.const_data_ptr<float>(), given.const_data_ptr<float>(),
                                        mask_bits.const_data_ptr<uint8_t>(), layout, slopes,
                                        dx.mutable_data_ptr<float>(), sums ? scratch.mutable_data_ptr() : nullptr,
                                        device.stream),
               "norm_quantize_backward");
  return {dx, dgamma, dbeta};
}

std::tuple<Tensor, Tensor> add_quantize_forward(Tensor x, Tensor other, double low_bound, double high_bound,
                                                OptionalTensor low, OptionalTensor high, OptionalTensor scale,
                                                OptionalTensor zero_point, OptionalTensor tracked, bool track,
                                                double average, int64_t qmin, int64_t qmax, bool symmetric,
                                                int64_t middle, bool power_of_two, bool with_mask) {
  const Device device(x);
  check_float(x, "x", device.index);
  check_float(other, "other", device.index);
  check(sizes_of(x) == sizes_of(other),
        "other of shape " + shape_of(other) + " is added to x of shape " + shape_of(x) + "; give tensors of one shape");
  const qat::Range bounds = float_range(low_bound, high_bound);
  const Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax,
                            {qmin, qmax, symmetric, middle, power_of_two}, bounds, device);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("norm_quantize_forward", TORCH_BOX(&norm_quantize_forward));
  m.impl("norm_quantize_backward", TORCH_BOX(&norm_quantize_backward));
  m.impl("add_quantize_forward", TORCH_BOX(&add_quantize_forward));
}
