// Checks of what the fused passes of batch norms and additions read.
#pragma once

#include "tensors.h"

namespace qat::ops {

inline void check_float(const Tensor& x, const char* name) {
  check_cpu(x, name);
  check(x.scalar_type() == ScalarType::Float,
        std::string(name) + " is not float32; convert it, or use the PyTorch path");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

inline std::vector<float> by_channel(const OptionalTensor& given, const char* name, int64_t count, float missing) {
  if (!given.has_value()) return std::vector<float>(static_cast<size_t>(count), missing);
  check_float(*given, name);
  check(given->numel() == count, std::to_string(given->numel()) + " values in " + name + " for " +
                                     std::to_string(count) + " channels; give the batch norm's");
  const Tensor values = torch::stable::contiguous(*given);
  const float* const data = values.const_data_ptr<float>();
  return {data, data + count};
}

}  // namespace qat::ops
