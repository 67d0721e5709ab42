// The operators of ops.cpp for tensors of the GPU, through torch's stable ABI. Compiled only for a torch with CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_observer_state.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

// Checks the grid and makes the result and its mask; run(from, to, bits, layout, scale, zero_point, range) launches
// what fills them where there are elements.
template <class Run>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
                                   int64_t qmax, int64_t axis, bool with_mask, const Run& run) {
  const qat::Range range = code_range(qmin, qmax);
  const int64_t count = channels_of(x, axis);
  const Tensor s = grid_values(scale, "scale", count, x), z = grid_values(zero_point, "zero_point", count, x);
  const Tensor y = torch::stable::empty_like(x), bits = new_bits(x, with_mask);
  if (x.numel() == 0) return {y, bits};
  const Tensor from = dense(x, y);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run(static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
        bits_or_null(bits, with_mask), layout_of(from, axis), s.const_data_ptr<float>(), z.const_data_ptr<float>(),
        range);
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, bool with_mask) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask,
                 [&](const auto* from, auto* to, uint8_t* bits, const qat::Layout& layout, const float* s,
                     const float* z, qat::Range range) {
                   check_launch(qat::cuda::fake_quantize(from, to, bits, layout, s, z, range, {}, device.stream),
                                "fake_quantize_forward");
                 });
}

std::tuple<Tensor, Tensor> fake_quantize_observe(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                                 int64_t axis, Tensor low, Tensor high, Tensor nonfinite,
                                                 OptionalTensor counts, int64_t mantissa_bits,
                                                 std::optional<double> momentum, bool with_mask) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const Statistics statistics(device, x, axis, low, high, nonfinite, counts, mantissa_bits, momentum);
  return forward(x, scale, zero_point, qmin, qmax, axis, with_mask,
                 [&](const auto* from, auto* to, uint8_t* bits, const qat::Layout& layout, const float* s,
                     const float* z, qat::Range range) {
                   statistics.take([&](const qat::HistogramOut& out) {
                     check_launch(qat::cuda::fake_quantize_observe(from, to, bits, layout, s, z, range, out,
                                                                   device.stream),
                                  "fake_quantize_observe");
                   });
                 });
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask_bits, std::vector<int64_t> strides) {
  const Device device(grad);
  check_values(grad, "grad", device.index);
  check_cuda(mask_bits, "mask_bits", device.index);
  const Masked m = masked(grad, mask_bits, strides);
  if (grad.numel() == 0) return m.out;
  by_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::mask_gradient<T>(static_cast<const T*>(m.from.const_data_ptr()),
                                             mask_bits.const_data_ptr<uint8_t>(),
                                             static_cast<T*>(m.out.mutable_data_ptr()), grad.numel(), device.stream),
                 "fake_quantize_backward");
  });
  return m.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_observe", TORCH_BOX(&fake_quantize_observe));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
}
