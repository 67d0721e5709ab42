// The factor of a batch norm that a weight is multiplied by.
#pragma once

#include <cmath>

#include "tensors.h"

namespace qat::ops {

inline std::vector<float> float_values(const Tensor& given, const char* name, int64_t count) {
  check_cpu(given, name);
  check(given.scalar_type() == ScalarType::Float && given.numel() == count,
        std::string(name) + " is not float32 with " + std::to_string(count) +
            " values; give the batch norm's, one an output channel");
  const Tensor values = torch::stable::contiguous(given);
  const float* const data = values.const_data_ptr<float>();
  return {data, data + count};
}

// gamma / sqrt(var + eps) by channel, gamma no closer to zero than `floor`.
inline std::vector<float> batch_norm_factor(const std::optional<Tensor>& gamma, const Tensor& var, double eps,
                                            double floor, int64_t channels) {
  std::vector<float> factor = float_values(var, "var", channels);
  std::vector<float> gammas(static_cast<size_t>(channels), 1.0f);
  if (gamma.has_value()) gammas = float_values(*gamma, "gamma", channels);
  const auto least = static_cast<float>(floor), added = static_cast<float>(eps);
  for (size_t c = 0; c < factor.size(); ++c) {
    const float g = std::abs(gammas[c]) < least ? std::copysign(least, gammas[c]) : gammas[c];
    factor[c] = g / std::sqrt(factor[c] + added);
  }
  return factor;
}

// Of a grouped transposed convolution: channel group x (outputs a group) + j for the rows of that group, in the order
// of the memory of `weight`, one an element.
inline std::vector<float> spread_over_groups(const Tensor& weight, const std::vector<float>& factor,
                                             int64_t groups) {
  const int64_t rows = weight.size(0) / groups, columns = weight.size(1);
  const int64_t inner = weight.numel() / (weight.size(0) * columns);
  std::vector<float> out(static_cast<size_t>(weight.numel()));
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 2; d < weight.dim(); ++d) {
    sizes.push_back(weight.size(d));
    strides.push_back(weight.stride(d));
  }
  for (int64_t i = 0; i < weight.size(0); ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const float f = factor[static_cast<size_t>(i / rows * columns + j)];
      for (int64_t k = 0; k < inner; ++k) {
        int64_t at = i * weight.stride(0) + j * weight.stride(1), rest = k;
        for (size_t d = 0; d < sizes.size(); ++d) {
          at += rest % sizes[d] * strides[d];
          rest /= sizes[d];
        }
        out[static_cast<size_t>(at)] = f;
      }
    }
  }
  return out;
}

// Where the values of the output channels lie among the elements of a dense weight. Not to be copied: `factor` points
// into `values`.
struct WeightFactor {
  // `by_output` has one value for each of `outputs_of` the weight.
  WeightFactor(const Tensor& weight, std::vector<float> by_output, int64_t channel_axis, int64_t groups) {
    if (groups > 1) {
      values = spread_over_groups(weight, by_output, groups);
      factor = {values.data(), {1, weight.numel(), 1}};
    } else {
      values = std::move(by_output);
      factor = {values.data(), layout_of(weight, channel_axis)};
    }
  }
  WeightFactor(const WeightFactor&) = delete;
  WeightFactor& operator=(const WeightFactor&) = delete;

  std::vector<float> values;
  qat::Factor factor;
};

}  // namespace qat::ops
