// What the registrations of the training operators share: checks of tensors, and how they become pointers and layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../kernels/training.h"

namespace qat::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Largest magnitude of a code for which float32 arithmetic on codes is exact.
constexpr int64_t exact = int64_t{1} << 23;

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("qat: " + message);
}

inline qat::Range code_range(int64_t qmin, int64_t qmax) {
  check(-exact <= qmin && qmin < qmax && qmax <= exact,
        "integer range [" + std::to_string(qmin) + ", " + std::to_string(qmax) +
            "] is empty or too wide for fake quantization; use 16 bits or fewer");
  return {static_cast<float>(qmin), static_cast<float>(qmax)};
}

// The instruction set in use (ops.cpp).
const qat::Kernels& kernels();

inline void parallel(int64_t begin, int64_t end, int64_t grain, qat::ParallelTask task, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { task(b, e, context); });
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  return text + ")";
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), std::string(name) + " is not on the CPU; give CPU tensors");
}

inline void check_values(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16,
        std::string(name) + " is neither float32 nor bfloat16; convert it, or use the PyTorch path");
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

// `x` itself, or a copy in the order that `like` (empty_like(x)) has where `x` is not dense.
inline Tensor dense(const Tensor& x, const std::optional<Tensor>& like = std::nullopt) {
  if (x.numel() == 0 || is_dense(x)) return x;
  Tensor copy = torch::stable::empty_like(like ? *like : x);
  torch::stable::copy_(copy, x);
  return copy;
}

inline Tensor new_cpu(std::vector<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

inline void check_axis(const Tensor& x, int64_t axis) {
  check(axis >= -1 && axis < x.dim(), "axis " + std::to_string(axis) + " of a tensor of shape " + shape_of(x) +
                                          "; choose an axis that exists, or -1 for per-tensor");
}

// Of a dense tensor that is not empty; axis -1: one channel.
inline qat::Layout layout_of(const Tensor& x, int64_t axis) {
  const int64_t n = x.numel();
  if (axis == -1 || x.size(axis) == 1) return {1, 1, n};
  const int64_t channels = x.size(axis), inner = x.stride(axis);
  return {n / (channels * inner), channels, inner};
}

inline std::vector<float> grid_values(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
  check_cpu(given, name);
  check(given.numel() == count, std::to_string(given.numel()) + " values in " + name + " for " +
                                    std::to_string(count) + " channels of a tensor of shape " + shape_of(x) +
                                    "; give one a channel, or one with axis -1");
  const Tensor values = torch::stable::contiguous(given);
  std::vector<float> out(static_cast<size_t>(count));
  const void* data = values.const_data_ptr();
  switch (values.scalar_type()) {
    case ScalarType::Float: std::copy_n(static_cast<const float*>(data), count, out.data()); break;
    case ScalarType::Int: std::copy_n(static_cast<const int32_t*>(data), count, out.data()); break;
    case ScalarType::Long: std::copy_n(static_cast<const int64_t*>(data), count, out.data()); break;
    default: check(false, std::string(name) + " is neither float32, int32 nor int64; convert it");
  }
  return out;
}

struct ExtremaTensors {
  Tensor low, high, nonfinite;
  qat::ExtremaOut out() const {
    return {low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>()};
  }
};

inline ExtremaTensors new_extrema(const Tensor& x, int64_t axis) {
  const std::vector<int64_t> sizes = axis == -1 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
  ExtremaTensors made{new_cpu(sizes, ScalarType::Float), new_cpu(sizes, ScalarType::Float),
                      new_cpu({}, ScalarType::Long)};
  std::fill_n(made.low.mutable_data_ptr<float>(), made.low.numel(), std::numeric_limits<float>::infinity());
  std::fill_n(made.high.mutable_data_ptr<float>(), made.high.numel(), -std::numeric_limits<float>::infinity());
  *made.nonfinite.mutable_data_ptr<int64_t>() = 0;
  return made;
}

inline bool same_order(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& strides) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), strides.data(),
      like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline void check_state(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  check_cpu(tensor, name);
  check(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(),
        std::string(name) + " is not a contiguous tensor of " + std::to_string(count) + " " +
            (type == ScalarType::Long ? "int64" : type == ScalarType::Int ? "int32" : "float32") +
            " values; give the module's buffer");
}

// Calls run(static_cast<T*>(nullptr)) with the type of the kernels that the elements of `x` have.
template <class Run>
void by_type(const Tensor& x, const Run& run) {
  if (x.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
}

}  // namespace qat::ops
