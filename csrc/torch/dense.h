// Dense memory of tensors, for the operators of the GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace qat::tensors {

using torch::stable::Tensor;

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("qat: " + message);
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  return text + ")";
}

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// `x` itself, or a copy in the order of empty_like(x).
inline Tensor dense(const Tensor& x) {
  if (x.numel() == 0 || is_dense(x)) return x;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

inline bool same_order(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

}  // namespace qat::tensors
