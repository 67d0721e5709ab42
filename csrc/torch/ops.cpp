// Registration of the operators `torch.ops.qat.*` through torch's stable ABI: one library serves torch 2.10 and later.
//
// Here tensors are checked and become pointers; everything else is in csrc/kernels. The fake kernels and the gradients
// are registered in Python (qat/native/operators.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/training.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raised with every change of an operator's schema or meaning; qat/native/loading.py names the one that it needs.
constexpr int64_t interface_version = 1;

// Largest magnitude of a code for which float32 arithmetic on codes is exact.
constexpr int64_t exact = int64_t{1} << 23;

void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("qat: " + message);
}

// ---- instruction set

const qat::Kernels* initial_kernels() {
  const char* wanted = std::getenv("QAT_NATIVE_ISA");
  return qat::find_kernels(wanted == nullptr ? "" : wanted);
}

std::atomic<const qat::Kernels*>& selected_kernels() {
  static std::atomic<const qat::Kernels*> kernels{initial_kernels()};
  return kernels;
}

const qat::Kernels& kernels() {
  const qat::Kernels* found = selected_kernels().load(std::memory_order_relaxed);
  check(found != nullptr, "QAT_NATIVE_ISA names an instruction set that is unknown or that this processor lacks; "
                          "choose portable, avx2 or avx512, or unset it");
  return *found;
}

void parallel(int64_t begin, int64_t end, int64_t grain, qat::ParallelTask task, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { task(b, e, context); });
}

// ---- tensors

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  return text + ")";
}

void check_cpu(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), std::string(name) + " is not on the CPU; give CPU tensors");
}

void check_values(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16,
        std::string(name) + " is neither float32 nor bfloat16; convert it, or use the PyTorch path");
}

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
bool is_dense(const Tensor& tensor) {
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
Tensor dense(const Tensor& x, const std::optional<Tensor>& like = std::nullopt) {
  if (x.numel() == 0 || is_dense(x)) return x;
  Tensor copy = torch::stable::empty_like(like ? *like : x);
  torch::stable::copy_(copy, x);
  return copy;
}

Tensor new_cpu(std::vector<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

void check_axis(const Tensor& x, int64_t axis) {
  check(axis >= -1 && axis < x.dim(), "axis " + std::to_string(axis) + " of a tensor of shape " + shape_of(x) +
                                          "; choose an axis that exists, or -1 for per-tensor");
}

// Of a dense tensor that is not empty; axis -1: one channel.
qat::Layout layout_of(const Tensor& x, int64_t axis) {
  const int64_t n = x.numel();
  if (axis == -1 || x.size(axis) == 1) return {1, 1, n};
  const int64_t channels = x.size(axis), inner = x.stride(axis);
  return {n / (channels * inner), channels, inner};
}

std::vector<float> grid_values(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
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

// ---- fake quantization

struct ExtremaTensors {
  Tensor low, high, nonfinite;
  qat::ExtremaOut out() const {
    return {low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>()};
  }
};

ExtremaTensors new_extrema(const Tensor& x, int64_t axis) {
  const std::vector<int64_t> sizes = axis == -1 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
  ExtremaTensors made{new_cpu(sizes, ScalarType::Float), new_cpu(sizes, ScalarType::Float),
                      new_cpu({}, ScalarType::Long)};
  std::fill_n(made.low.mutable_data_ptr<float>(), made.low.numel(), std::numeric_limits<float>::infinity());
  std::fill_n(made.high.mutable_data_ptr<float>(), made.high.numel(), -std::numeric_limits<float>::infinity());
  *made.nonfinite.mutable_data_ptr<int64_t>() = 0;
  return made;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                   int64_t qmax, int64_t axis, bool with_mask, const ExtremaTensors* extrema) {
  check(-exact <= qmin && qmin < qmax && qmax <= exact,
        "integer range [" + std::to_string(qmin) + ", " + std::to_string(qmax) +
            "] is empty or too wide for fake quantization; use 16 bits or fewer");
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  const std::vector<float> s = grid_values(scale, "scale", count, x);
  const std::vector<float> z = grid_values(zero_point, "zero_point", count, x);
  Tensor y = torch::stable::empty_like(x);
  const Tensor bits = new_cpu({with_mask ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
  if (x.numel() == 0) return {y, bits};
  const Tensor from = dense(x, y);
  const qat::Layout layout = layout_of(from, axis);
  const qat::Range range{static_cast<float>(qmin), static_cast<float>(qmax)};
  uint8_t* const to = with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  std::optional<qat::ExtremaOut> out;
  if (extrema != nullptr) out = extrema->out();
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::fake_quantize<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()),
                          static_cast<T*>(y.mutable_data_ptr()), to, layout, s.data(), z.data(), range,
                          out ? &*out : nullptr);
  };
  if (x.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, bool with_mask) {
  check_values(x, "x");
  check_axis(x, axis);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fake_quantize_observe_forward(Tensor x, Tensor scale,
                                                                                 Tensor zero_point, int64_t qmin,
                                                                                 int64_t qmax, int64_t axis,
                                                                                 bool with_mask) {
  check_values(x, "x");
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis);
  const auto [y, bits] = forward(x, scale, zero_point, qmin, qmax, axis, with_mask, &extrema);
  return {y, bits, extrema.low, extrema.high, extrema.nonfinite};
}

bool same_order(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& strides) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), strides.data(),
      like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask_bits, std::vector<int64_t> strides) {
  check_values(grad, "grad");
  check_cpu(mask_bits, "mask_bits");
  const int64_t n = grad.numel();
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() && mask_bits.numel() == (n + 7) / 8,
        "mask_bits does not fit a gradient of shape " + shape_of(grad) +
            "; give the contiguous uint8 tensor that the forward pass returned with with_mask=True");
  check(static_cast<int64_t>(strides.size()) == grad.dim() &&
            std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s >= 0; }),
        "strides do not fit a gradient of shape " + shape_of(grad) + "; give those of the quantized tensor");
  Tensor out = empty_strided(grad, strides);
  if (n == 0) return out;
  check(is_dense(out), "strides are not those of a dense tensor of shape " + shape_of(grad) +
                           "; give those of the quantized tensor");
  Tensor from = grad;
  if (!same_order(grad, strides)) {  // the bits are in the order of memory of the quantized tensor
    from = out;
    torch::stable::copy_(from, grad);
  }
  const uint8_t* bits = mask_bits.const_data_ptr<uint8_t>();
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::mask_gradient<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()), bits,
                          static_cast<T*>(out.mutable_data_ptr()), n);
  };
  if (grad.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
  return out;
}

// ---- observers

std::tuple<Tensor, Tensor, Tensor> observe_minmax(Tensor x, int64_t axis) {
  check_values(x, "x");
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis);
  if (x.numel() > 0) {
    const Tensor from = dense(x);
    const qat::Layout layout = layout_of(from, axis);
    const auto run = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      qat::observe_extrema<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()), layout,
                              extrema.out());
    };
    if (x.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
    else run(static_cast<uint16_t*>(nullptr));
  }
  return {extrema.low, extrema.high, extrema.nonfinite};
}

void check_state(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  check_cpu(tensor, name);
  check(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(),
        std::string(name) + " is not a contiguous tensor of " + std::to_string(count) + " " +
            (type == ScalarType::Long ? "int64" : "float32") + " values; give the observer's buffer");
}

void observe_histogram(Tensor x, Tensor counts, Tensor low, Tensor high, Tensor nonfinite) {
  check_values(x, "x");
  check_state(counts, "counts", ScalarType::Long, qat::histogram_bins);
  check_state(low, "low", ScalarType::Float, 1);
  check_state(high, "high", ScalarType::Float, 1);
  check_state(nonfinite, "nonfinite", ScalarType::Long, 1);
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  const ExtremaTensors extrema{low, high, nonfinite};
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::observe_histogram<T>(kernels(), parallel, torch::stable::get_num_threads(),
                              static_cast<const T*>(from.const_data_ptr()), x.numel(),
                              counts.mutable_data_ptr<int64_t>(), extrema.out());
  };
  if (x.scalar_type() == ScalarType::Float) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
}

// ---- about the library

int64_t get_interface() { return interface_version; }

std::string get_isa() { return kernels().isa; }

// For tests: returns the instruction set that was in use.
std::string use_isa(std::string isa) {
  const qat::Kernels* found = qat::find_kernels(isa.c_str());
  check(found != nullptr, "instruction set '" + isa + "' is unknown, or this processor lacks it; "
                              "choose portable, avx2 or avx512");
  const std::string before = kernels().isa;
  selected_kernels().store(found);
  return before;
}

}  // namespace

STABLE_TORCH_LIBRARY(qat, m) {
  m.def("fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int axis=-1, "
        "bool with_mask=True) -> (Tensor, Tensor)");
  m.def("fake_quantize_observe_forward(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int axis=-1, "
        "bool with_mask=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask_bits, SymInt[] strides) -> Tensor");
  m.def("observe_minmax(Tensor x, int axis=-1) -> (Tensor, Tensor, Tensor)");
  m.def("observe_histogram(Tensor x, Tensor(a!) counts, Tensor(b!) low, Tensor(c!) high, Tensor(d!) nonfinite) -> ()");
  m.def("_interface() -> int");
  m.def("_isa() -> str");
  m.def("_use_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_observe_forward", TORCH_BOX(&fake_quantize_observe_forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_interface", TORCH_BOX(&get_interface));
  m.impl("_isa", TORCH_BOX(&get_isa));
  m.impl("_use_isa", TORCH_BOX(&use_isa));
}
