// Registration of the observers.
#include "../kernels/clipping.h"
#include "observer_state.h"

namespace {

using namespace qat::ops;

void extrema_of(const Tensor& x, int64_t axis, const qat::ExtremaOut& out) {
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  const qat::Layout layout = layout_of(from, axis);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::observe_extrema<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()), layout, out);
  });
}

std::tuple<Tensor, Tensor, Tensor> observe_minmax(Tensor x, int64_t axis) {
  check_values(x, "x");
  check_axis(x, axis);
  const ExtremaTensors extrema = new_extrema(x, axis);
  extrema_of(x, axis, extrema.out());
  return {extrema.low, extrema.high, extrema.nonfinite};
}

void observe_range(Tensor x, Tensor low, Tensor high, Tensor nonfinite, int64_t axis, std::optional<double> momentum) {
  check_values(x, "x");
  check_axis(x, axis);
  const Statistics statistics(x, axis, low, high, nonfinite, std::nullopt, 0, momentum);
  statistics.take([&](const qat::HistogramOut& out) { extrema_of(x, axis, out.extrema); });
}

void observe_histogram(Tensor x, Tensor counts, Tensor low, Tensor high, Tensor nonfinite, int64_t axis,
                       int64_t mantissa_bits) {
  check_values(x, "x");
  check_axis(x, axis);
  const int64_t channels = axis == -1 ? 1 : x.size(axis);
  const qat::HistogramOut out = histogram_state(counts, low, high, nonfinite, channels, mantissa_bits);
  if (x.numel() == 0) return;
  const Tensor from = dense(x);
  const qat::Layout layout = layout_of(from, axis);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::observe_histogram<T>(kernels(), parallel, torch::stable::get_num_threads(),
                              static_cast<const T*>(from.const_data_ptr()), layout, out);
  });
}

std::tuple<Tensor, Tensor> clip_ranges(Tensor counts, Tensor low, Tensor high, int64_t mantissa_bits,
                                       double negative_weight, double margin, int64_t qmin, int64_t qmax,
                                       bool symmetric, int64_t middle, bool power_of_two) {
  check_mantissa(mantissa_bits);
  const int64_t channels = low.numel();
  check_state(counts, "counts", ScalarType::Long, channels << (9 + mantissa_bits));
  check_state(low, "low", ScalarType::Double, channels);
  check_state(high, "high", ScalarType::Double, channels);
  code_range(qmin, qmax);
  check(!symmetric || (qmin <= middle && middle <= qmax), "middle is outside the integer range; give a code");
  const Tensor lows = torch::stable::clone(low), highs = torch::stable::clone(high);
  const qat::ClipTask task{static_cast<int>(mantissa_bits), negative_weight, margin,
                           {qmin, qmax, symmetric, middle, power_of_two}};
  qat::clip_ranges(kernels(), parallel, counts.const_data_ptr<int64_t>(), channels, task,
                   lows.mutable_data_ptr<double>(), highs.mutable_data_ptr<double>());
  return {lows, highs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("observe_minmax(Tensor x, int axis=-1) -> (Tensor, Tensor, Tensor)");
  m.def("observe_range(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) nonfinite, int axis=-1, "
        "float? momentum=None) -> ()");
  m.def("observe_histogram(Tensor x, Tensor(a!) counts, Tensor(b!) low, Tensor(c!) high, Tensor(d!) nonfinite, "
        "int axis=-1, int mantissa_bits=7) -> ()");
  m.def("clip_ranges(Tensor counts, Tensor low, Tensor high, int mantissa_bits, float negative_weight, float margin, "
        "int qmin, int qmax, bool symmetric, int middle, bool power_of_two) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_range", TORCH_BOX(&observe_range));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
  m.impl("clip_ranges", TORCH_BOX(&clip_ranges));
}
