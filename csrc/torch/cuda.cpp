// The operators of ops.cpp for tensors of the GPU, through torch's stable ABI. Compiled only for a torch with CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/launch.h"
#include "cuda.h"

namespace {

using namespace qat::tensors;
using qat::cuda::ExtremaOut;
using qat::cuda::Layout;

constexpr int64_t exact = int64_t{1} << 23;  // float32 arithmetic on codes of this magnitude is exact
constexpr int64_t histogram_bins = 65536;

void check_values(const Tensor& tensor, const char* name, int32_t device) {
  check_cuda(tensor, name, device);
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16,
        std::string(name) + " is neither float32 nor bfloat16; convert it, or use the PyTorch path");
}

void check_axis(const Tensor& x, int64_t axis) {
  check(axis >= -1 && axis < x.dim(), "axis " + std::to_string(axis) + " of a tensor of shape " + shape_of(x) +
                                          "; choose an axis that exists, or -1 for per-tensor");
}

// Of a dense tensor that is not empty; axis -1: one channel.
Layout layout_of(const Tensor& x, int64_t axis) {
  const int64_t n = x.numel();
  if (axis == -1 || x.size(axis) == 1) return {1, 1, n};
  const int64_t channels = x.size(axis), inner = x.stride(axis);
  return {n / (channels * inner), channels, inner};
}

// Stays on the device: a division by a number of the host is another one.
Tensor grid_values(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
  check_cuda(given, name, x.get_device_index());
  check(given.numel() == count, std::to_string(given.numel()) + " values in " + name + " for " +
                                    std::to_string(count) + " channels of a tensor of shape " + shape_of(x) +
                                    "; give one a channel, or one with axis -1");
  const ScalarType type = given.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Int || type == ScalarType::Long,
        std::string(name) + " is neither float32, int32 nor int64; convert it");
  const Tensor values = torch::stable::contiguous(given);
  return type == ScalarType::Float ? values : torch::stable::to(values, ScalarType::Float);
}

// f(null pointer of the kernels' type of the elements)
template <class F>
void with_type(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Float) f(static_cast<float*>(nullptr));
  else f(static_cast<uint16_t*>(nullptr));
}

struct ExtremaTensors {
  Tensor low, high, nonfinite;
  ExtremaOut out() const {
    return {low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>()};
  }
};

ExtremaTensors new_extrema(const Tensor& x, int64_t axis, cudaStream_t stream) {
  const std::vector<int64_t> sizes = axis == -1 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
  const ExtremaTensors made{torch::stable::new_empty(x, sizes, ScalarType::Float),
                            torch::stable::new_empty(x, sizes, ScalarType::Float),
                            torch::stable::new_empty(x, std::vector<int64_t>{}, ScalarType::Long)};
  check_launch(qat::cuda::clear_extrema(made.out(), made.low.numel(), stream), "observe_minmax");
  return made;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                   int64_t qmax, int64_t axis, bool with_mask, ExtremaOut extrema,
                                   cudaStream_t stream) {
  check(-exact <= qmin && qmin < qmax && qmax <= exact,
        "integer range [" + std::to_string(qmin) + ", " + std::to_string(qmax) +
            "] is empty or too wide for fake quantization; use 16 bits or fewer");
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  const Tensor s = grid_values(scale, "scale", count, x), z = grid_values(zero_point, "zero_point", count, x);
  const Tensor from = dense(x);
  Tensor y = torch::stable::empty_like(from);
  const std::vector<int64_t> size{with_mask ? (x.numel() + 7) / 8 : 0};
  const Tensor bits = torch::stable::new_empty(x, size, ScalarType::Byte);
  if (x.numel() == 0) return {y, bits};
  const qat::cuda::Range range{static_cast<float>(qmin), static_cast<float>(qmax)};
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::fake_quantize<T>(static_cast<const T*>(from.const_data_ptr()),
                                             static_cast<T*>(y.mutable_data_ptr()),
                                             with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr,
                                             layout_of(from, axis), s.const_data_ptr<float>(),
                                             z.const_data_ptr<float>(), range, extrema, stream),
                 "fake_quantize_forward");
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, bool with_mask) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask, {}, device.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fake_quantize_observe_forward(Tensor x, Tensor scale,
                                                                                 Tensor zero_point, int64_t qmin,
                                                                                 int64_t qmax, int64_t axis,
                                                                                 bool with_mask) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis, device.stream);
  const auto [y, bits] = forward(x, scale, zero_point, qmin, qmax, axis, with_mask, extrema.out(), device.stream);
  return {y, bits, extrema.low, extrema.high, extrema.nonfinite};
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask_bits, std::vector<int64_t> strides) {
  const Device device(grad);
  check_values(grad, "grad", device.index);
  check_cuda(mask_bits, "mask_bits", device.index);
  const int64_t n = grad.numel();
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() && mask_bits.numel() == (n + 7) / 8,
        "mask_bits does not fit a gradient of shape " + shape_of(grad) +
            "; give the contiguous uint8 tensor that the forward pass returned with with_mask=True");
  check(static_cast<int64_t>(strides.size()) == grad.dim() &&
            std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s >= 0; }),
        "strides do not fit a gradient of shape " + shape_of(grad) + "; give those of the quantized tensor");
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      grad.dim(), grad.sizes().data(), strides.data(),
      grad.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cuda(), device.index, &made));
  Tensor out(made);
  if (n == 0) return out;
  check(is_dense(out), "strides are not those of a dense tensor of shape " + shape_of(grad) +
                           "; give those of the quantized tensor");
  Tensor from = grad;
  if (!same_order(grad, strides)) {  // the bits are in the order of memory of the quantized tensor
    from = out;
    torch::stable::copy_(from, grad);
  }
  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::mask_gradient<T>(static_cast<const T*>(from.const_data_ptr()),
                                             mask_bits.const_data_ptr<uint8_t>(),
                                             static_cast<T*>(out.mutable_data_ptr()), n, device.stream),
                 "fake_quantize_backward");
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> observe_minmax(Tensor x, int64_t axis) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis, device.stream);
  if (x.numel() > 0) {
    const Tensor from = dense(x);
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      check_launch(qat::cuda::observe_extrema<T>(static_cast<const T*>(from.const_data_ptr()), layout_of(from, axis),
                                                 extrema.out(), device.stream),
                   "observe_minmax");
    });
  }
  return {extrema.low, extrema.high, extrema.nonfinite};
}

void check_state(const Tensor& tensor, const char* name, ScalarType type, int64_t count, int32_t device) {
  check_cuda(tensor, name, device);
  check(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(),
        std::string(name) + " is not a contiguous tensor of " + std::to_string(count) + " " +
            (type == ScalarType::Long ? "int64" : "float32") + " values; give the observer's buffer");
}

void observe_histogram(Tensor x, Tensor counts, Tensor low, Tensor high, Tensor nonfinite, int64_t axis,
                       int64_t mantissa_bits) {
  const Device device(x);
  check(axis == -1 && mantissa_bits == 7,
        "histograms by channel, or of other than 7 bits of the mantissa, have no CUDA kernel; use the PyTorch path");
  check_values(x, "x", device.index);
  check_state(counts, "counts", ScalarType::Long, histogram_bins, device.index);
  check_state(low, "low", ScalarType::Float, 1, device.index);
  check_state(high, "high", ScalarType::Float, 1, device.index);
  check_state(nonfinite, "nonfinite", ScalarType::Long, 1, device.index);
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  const ExtremaTensors extrema{low, high, nonfinite};
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::observe_histogram<T>(static_cast<const T*>(from.const_data_ptr()), x.numel(),
                                                 counts.mutable_data_ptr<int64_t>(), extrema.out(), device.stream),
                 "observe_histogram");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_observe_forward", TORCH_BOX(&fake_quantize_observe_forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
}
