// What the registrations of every device share: checks of tensors, and how dense ones become layouts and pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels/norm.h"
#include "../kernels/ranges.h"

namespace qat::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline qat::GridRule rule_of(int64_t qmin, int64_t qmax, bool symmetric, int64_t middle, bool power_of_two) {
  check(!symmetric || (qmin <= middle && middle <= qmax),
        "middle " + std::to_string(middle) + " is outside [" + std::to_string(qmin) + ", " + std::to_string(qmax) +
            "]; give the symmetric zero point, a code");
  return {qmin, qmax, symmetric, middle, power_of_two};
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  return text + ")";
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Double: return "float64";
    default: return "float32";
  }
}

// ---- checks that know no device

inline void check_number(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16,
        std::string(name) + " is neither float32 nor bfloat16; convert it, or use the PyTorch path");
}

inline void check_axis(const Tensor& x, int64_t axis) {
  check(axis >= -1 && axis < x.dim(), "axis " + std::to_string(axis) + " of a tensor of shape " + shape_of(x) +
                                          "; choose an axis that exists, or -1 for per-tensor");
}

inline void check_count(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
  check(given.numel() == count, std::to_string(given.numel()) + " values in " + name + " for " +
                                    std::to_string(count) + " channels of a tensor of shape " + shape_of(x) +
                                    "; give one a channel, or one with axis -1");
  const ScalarType type = given.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Int || type == ScalarType::Long,
        std::string(name) + " is neither float32, int32 nor int64; convert it");
}

inline void check_buffer(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  check(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(),
        std::string(name) + " is not a contiguous tensor of " + std::to_string(count) + " " +
            type_name(type) + " values; give the module's buffer");
}

// The number of output channels of a weight, that a batch norm has too.
inline int64_t outputs_of(const Tensor& weight, int64_t channel_axis, int64_t groups) {
  check(channel_axis >= 0 && channel_axis < weight.dim(),
        "channel_axis " + std::to_string(channel_axis) + " of a weight of shape " + shape_of(weight) +
            "; choose that of the output channels");
  check(groups == 1 || (groups > 1 && channel_axis == 1 && weight.size(0) % groups == 0),
        std::to_string(groups) + " groups do not fit a weight of shape " + shape_of(weight) +
            "; give groups only with channel_axis 1, a divisor of the input channels");
  return weight.size(channel_axis) * groups;
}

inline void check_mantissa(int64_t mantissa_bits) {
  check(mantissa_bits >= 0 && mantissa_bits <= 10,
        "mantissa_bits " + std::to_string(mantissa_bits) + " is outside [0, 10]; choose one of these");
}

// Which elements keep their value (QDrop); none without a seed, which is on the CPU whatever the device is.
inline std::optional<qat::Drop> drop_of(const OptionalTensor& seed, double probability) {
  if (!seed.has_value()) return std::nullopt;
  check(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
        "seed is not one int64 value on the CPU; give such a tensor");
  check(probability >= 0.0 && probability <= 1.0,
        "drop is " + std::to_string(probability) + "; give a probability in [0, 1]");
  return qat::Drop{*seed->const_data_ptr<int64_t>(), static_cast<float>(std::nearbyint(probability * 0x1p24))};
}

// Of a gradient, in the order of memory that `strides` name.
inline void check_mask(const Tensor& grad, const Tensor& mask_bits, const std::vector<int64_t>& strides) {
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() &&
            mask_bits.numel() == (grad.numel() + 7) / 8,
        "mask_bits does not fit a gradient of shape " + shape_of(grad) +
            "; give the contiguous uint8 tensor that the forward pass returned with with_mask=True");
  check(static_cast<int64_t>(strides.size()) == grad.dim() &&
            std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s >= 0; }),
        "strides do not fit a gradient of shape " + shape_of(grad) + "; give those of the quantized tensor");
}

// ---- dense memory

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

inline bool same_order(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

// Uninitialized, on the device of `like`.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& strides) {
  const bool cuda = like.is_cuda();
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), strides.data(),
      like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), cuda ? like.get_device_index() : 0, &made));
  return Tensor(made);
}

// `tensor` itself, or a copy that has the shape and the order of memory of `like`, which is dense.
inline Tensor in_order_of(const Tensor& tensor, const Tensor& like) {
  if (same_order(tensor, strides_of(like))) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Of a dense tensor that is not empty; axis -1: one channel.
inline qat::Layout layout_of(const Tensor& x, int64_t axis) {
  const int64_t n = x.numel();
  if (axis == -1 || x.size(axis) == 1) return {1, 1, n};
  const int64_t channels = x.size(axis), inner = x.stride(axis);
  return {n / (channels * inner), channels, inner};
}

// How many rows come in: the size of the first dimension.
inline int64_t rows_of(const Tensor& x) { return x.dim() > 0 ? x.size(0) : 1; }

struct ExtremaTensors {
  Tensor low, high, nonfinite;
  qat::ExtremaOut out() const {
    return {low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>()};
  }
};

// Calls run(static_cast<T*>(nullptr)) with the type of the kernels that the elements of `x` have.
template <class Run>
void by_type(const Tensor& x, const Run& run) {
  if (x.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
}

// What a backward pass through a mask reads and writes; `from` and `out` have the mask's order of memory.
struct Masked {
  Tensor from, out;
};

inline Masked masked(const Tensor& grad, const Tensor& mask_bits, const std::vector<int64_t>& strides) {
  check_mask(grad, mask_bits, strides);
  Tensor out = empty_strided(grad, strides);
  if (grad.numel() == 0) return {grad, out};
  check(is_dense(out), "strides are not those of a dense tensor of shape " + shape_of(grad) +
                           "; give those of the quantized tensor");
  if (same_order(grad, strides)) return {grad, out};
  Tensor from = out;
  torch::stable::copy_(from, grad);
  return {from, out};
}

}  // namespace qat::ops
