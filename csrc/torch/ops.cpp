// Registration of the operators `torch.ops.qat.*` through torch's stable ABI: one library serves torch 2.10 and later.
//
// Here tensors are checked and become pointers; everything else is in csrc/kernels. The fake kernels and the gradients
// are registered in Python (qat/native/operators.py).
#include <atomic>
#include <cstdlib>

#include "../kernels/quantize_observe.h"
#include "observer_state.h"

namespace {

using namespace qat::ops;

// Raised with every change of an operator's schema or meaning; qat/native/loading.py names the one that it needs.
constexpr int64_t interface_version = 10;

// ---- instruction set

const qat::Kernels* initial_kernels() {
  const char* wanted = std::getenv("QAT_NATIVE_ISA");
  return qat::find_kernels(wanted == nullptr ? "" : wanted);
}

std::atomic<const qat::Kernels*>& selected_kernels() {
  static std::atomic<const qat::Kernels*> kernels{initial_kernels()};
  return kernels;
}

}  // namespace

const qat::Kernels& qat::ops::kernels() {
  const qat::Kernels* found = selected_kernels().load(std::memory_order_relaxed);
  check(found != nullptr, "QAT_NATIVE_ISA names an instruction set that is unknown or that this processor lacks; "
                          "choose portable, avx2 or avx512, or unset it");
  return *found;
}

namespace {

// ---- fake quantization

// Checks the grid and makes the result and its mask; run(from, to, bits, layout, scale, zero_point, range) fills them
// where there are elements.
template <class Run>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                   int64_t qmax, int64_t axis, bool with_mask, const Run& run) {
  const qat::Range range = code_range(qmin, qmax);
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  const std::vector<float> s = grid_values(scale, "scale", count, x);
  const std::vector<float> z = grid_values(zero_point, "zero_point", count, x);
  Tensor y = torch::stable::empty_like(x);
  const Tensor bits = new_cpu({with_mask ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
  if (x.numel() == 0) return {y, bits};
  const Tensor from = dense(x, y);
  uint8_t* const to = with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run(static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), to, layout_of(from, axis),
        s.data(), z.data(), range);
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, bool with_mask) {
  check_values(x, "x");
  check_axis(x, axis);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask,
                 [](const auto* from, auto* to, uint8_t* bits, const qat::Layout& layout, const float* s,
                    const float* z, qat::Range range) {
                   qat::fake_quantize(kernels(), parallel, from, to, bits, layout, s, z, range, nullptr);
                 });
}

std::tuple<Tensor, Tensor> fake_quantize_observe(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, Tensor low, Tensor high, Tensor nonfinite,
                                                 OptionalTensor counts, int64_t mantissa_bits,
                                                 std::optional<double> momentum, bool with_mask) {
  check_values(x, "x");
  check_axis(x, axis);
  const Statistics statistics(x, axis, low, high, nonfinite, counts, mantissa_bits, momentum);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask,
                 [&](const auto* from, auto* to, uint8_t* bits, const qat::Layout& layout, const float* s,
                     const float* z, qat::Range range) {
                   statistics.take([&](const qat::HistogramOut& out) {
                     qat::fake_quantize_observe(kernels(), parallel, torch::stable::get_num_threads(), from, to, bits,
                                                layout, s, z, range, out);
                   });
                 });
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask_bits, std::vector<int64_t> strides) {
  check_values(grad, "grad");
  check_cpu(mask_bits, "mask_bits");
  const Masked m = masked(grad, mask_bits, strides);
  if (grad.numel() == 0) return m.out;
  by_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::mask_gradient<T>(kernels(), parallel, static_cast<const T*>(m.from.const_data_ptr()),
                          mask_bits.const_data_ptr<uint8_t>(), static_cast<T*>(m.out.mutable_data_ptr()),
                          grad.numel());
  });
  return m.out;
}

// ---- about the library

// Whether all of the first n bits are set.
bool all_set(Tensor mask_bits, int64_t n) {
  check_cpu(mask_bits, "mask_bits");
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() && n >= 0 &&
            mask_bits.numel() == (n + 7) / 8,
        "mask_bits does not have " + std::to_string(n) + " bits; give what a forward pass returned");
  const uint8_t* const bits = mask_bits.const_data_ptr<uint8_t>();
  const int64_t whole = n / 8;
  const int rest = static_cast<int>(n % 8), last = (1 << rest) - 1;
  return std::all_of(bits, bits + whole, [](uint8_t byte) { return byte == 0xff; }) &&
         (rest == 0 || (bits[whole] & last) == last);
}

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
  m.def("fake_quantize_observe(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int axis, "
        "Tensor(a!) low, Tensor(b!) high, Tensor(c!) nonfinite, Tensor(d!)? counts, int mantissa_bits, "
        "float? momentum, bool with_mask) -> (Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask_bits, SymInt[] strides) -> Tensor");
  m.def("_all_set(Tensor mask_bits, int n) -> bool");
  m.def("_interface() -> int");
  m.def("_isa() -> str");
  m.def("_use_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_observe", TORCH_BOX(&fake_quantize_observe));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_all_set", TORCH_BOX(&all_set));
  m.impl("_interface", TORCH_BOX(&get_interface));
  m.impl("_isa", TORCH_BOX(&get_isa));
  m.impl("_use_isa", TORCH_BOX(&use_isa));
}
