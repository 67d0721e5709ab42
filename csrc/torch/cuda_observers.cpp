// The operators of observers.cpp on the GPU; the search of clip ranges stays on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_observer_state.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

void extrema_of(const Tensor& x, int64_t axis, const qat::ExtremaOut& out, cudaStream_t stream) {
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::observe_extrema<T>(static_cast<const T*>(from.const_data_ptr()), layout_of(from, axis), out,
                                               stream),
                 "observe_minmax");
  });
}

std::tuple<Tensor, Tensor, Tensor> observe_minmax(Tensor x, int64_t axis) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis, device.stream);
  extrema_of(x, axis, extrema.out(), device.stream);
  return {extrema.low, extrema.high, extrema.nonfinite};
}

void observe_range(Tensor x, Tensor low, Tensor high, Tensor nonfinite, int64_t axis, std::optional<double> momentum) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const Statistics statistics(device, x, axis, low, high, nonfinite, std::nullopt, 0, momentum);
  statistics.take([&](const qat::HistogramOut& out) { extrema_of(x, axis, out.extrema, device.stream); });
}

void observe_histogram(Tensor x, Tensor counts, Tensor low, Tensor high, Tensor nonfinite, int64_t axis,
                       int64_t mantissa_bits) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const qat::HistogramOut out =
      histogram_state(counts, low, high, nonfinite, channels_of(x, axis), mantissa_bits, device.index);
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::observe_histogram<T>(static_cast<const T*>(from.const_data_ptr()), layout_of(from, axis),
                                                 out, device.stream),
                 "observe_histogram");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_range", TORCH_BOX(&observe_range));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
}
