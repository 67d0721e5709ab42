// The factor of a batch norm that a weight is multiplied by, on the device.
#pragma once

#include "cuda.h"

namespace qat::ops::gpu {

// Float32 values of a batch norm, one an output channel.
inline Tensor norm_values(const Tensor& given, const char* name, int64_t count, int32_t device) {
  check_cuda(given, name, device);
  check(given.scalar_type() == ScalarType::Float && given.numel() == count,
        std::string(name) + " is not float32 with " + std::to_string(count) +
            " values; give the batch norm's, one an output channel");
  return torch::stable::contiguous(given);
}

// Of a dense weight; a dimension of one element may have any stride.
inline qat::cuda::ChannelMap channel_map(const Tensor& weight, int64_t axis, int64_t groups) {
  const auto stride = [&](int64_t d) { return weight.size(d) == 1 ? 1 : weight.stride(d); };
  if (groups == 1) return {1, 1, 1, stride(axis), weight.size(axis)};
  return {stride(0), weight.size(0), weight.size(0) / groups, stride(axis), weight.size(axis)};
}

struct WeightNorm {
  WeightNorm(const OptionalTensor& given, const Tensor& var, int64_t outputs, int32_t device)
      : variance(norm_values(var, "var", outputs, device)) {
    if (given.has_value()) gamma = norm_values(*given, "gamma", outputs, device);
  }

  qat::cuda::BatchNorm factor(double eps, double floor, const qat::cuda::ChannelMap& map) const {
    return {gamma ? gamma->const_data_ptr<float>() : nullptr, variance.const_data_ptr<float>(),
            static_cast<float>(eps), static_cast<float>(floor), map};
  }

  Tensor variance;
  OptionalTensor gamma;
};

}  // namespace qat::ops::gpu
