// The fused passes of training on tensors of a GPU, for static grids (cuda_norm.cpp) and learned ones
// (cuda_norm_learned.cpp).
#pragma once

#include <tuple>

#include "cuda.h"

namespace qat::ops::gpu {

inline void check_float(const Tensor& x, const char* name, int32_t device) {
  check_cuda(x, name, device);
  check(x.scalar_type() == ScalarType::Float,
        std::string(name) + " is not float32; convert it, or use the PyTorch path");
}

// Contiguous; none stays none.
inline OptionalTensor by_channel(const OptionalTensor& given, const char* name, int64_t count, int32_t device) {
  if (!given.has_value()) return std::nullopt;
  check_float(*given, name, device);
  check(given->numel() == count, std::to_string(given->numel()) + " values in " + name + " for " +
                                     std::to_string(count) + " channels; give the batch norm's");
  return torch::stable::contiguous(*given);
}

inline const float* read(const OptionalTensor& given) { return given ? given->const_data_ptr<float>() : nullptr; }
inline float* write(const OptionalTensor& given) { return given ? given->mutable_data_ptr<float>() : nullptr; }

// The quantizer of the result: the buffers of a static one, and how it follows the batches, or a grid that is given.
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

  explicit Quantizer(const qat::cuda::StepsOnDevice& given) : quantizes(true), tracks(false), steps(given) {}

  bool quantizes, tracks;
  qat::cuda::StepsOnDevice steps;
  qat::cuda::Tracking tracking{};
};

struct BatchNorm {
  OptionalTensor gamma, beta, running_mean, running_var;
  bool batch_statistics;
  double momentum, eps;
};

inline qat::Drop drop_or_none(const OptionalTensor& seed, double probability) {
  return drop_of(seed, probability).value_or(qat::Drop{0, 0.0f});
}

inline qat::Range bounds_of(double low, double high) { return {static_cast<float>(low), static_cast<float>(high)}; }

// Result, mask, and the mean and inverse deviation that were used; `device` is that of x.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Device& device, const Tensor& x, const BatchNorm& norm,
                                                        qat::Range bounds, const Quantizer& quantizer, bool with_mask);

// Result and mask.
std::tuple<Tensor, Tensor> add_forward(const Device& device, const Tensor& x, const Tensor& other, qat::Range bounds,
                                       const Quantizer& quantizer, bool with_mask);

struct Saved {
  Tensor x, mask_bits;
  OptionalTensor gamma;
  Tensor mean, invstd;
  bool batch_statistics;
};

// What a backward pass through a batch norm works with, checked: on the device, and in the order of memory of x.
struct NormBackward {
  NormBackward(const Device& device, const Tensor& grad, const Saved& saved, bool with_sums);

  Tensor dx, from, given, dgamma, dbeta, lines, scratch;
  OptionalTensor weight, means, inverses;
  qat::Layout layout;
  qat::cuda::NormSlopes slopes;
};

}  // namespace qat::ops::gpu
