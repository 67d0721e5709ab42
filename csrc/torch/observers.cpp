// Registration of the observers, and of observation in the same pass as fake quantization.
#include "../kernels/clipping.h"
#include "../kernels/histogram.h"
#include "tensors.h"

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

ExtremaTensors state(const Tensor& low, const Tensor& high, const Tensor& nonfinite, int64_t channels) {
  check_state(low, "low", ScalarType::Float, channels);
  check_state(high, "high", ScalarType::Float, channels);
  check_state(nonfinite, "nonfinite", ScalarType::Long, 1);
  return {low, high, nonfinite};
}

void observe_range(Tensor x, Tensor low, Tensor high, Tensor nonfinite, int64_t axis, std::optional<double> momentum) {
  check_values(x, "x");
  check_axis(x, axis);
  const int64_t channels = axis == -1 ? 1 : x.size(axis);
  const qat::ExtremaOut out = state(low, high, nonfinite, channels).out();
  if (!momentum.has_value()) return extrema_of(x, axis, out);
  const ExtremaTensors batch = new_extrema(x, axis);
  const qat::ExtremaOut found = batch.out();
  extrema_of(x, axis, found);
  for (int64_t c = 0; c < channels; ++c) {
    if (found.low[c] > found.high[c]) continue;
    const bool first = out.low[c] > out.high[c];
    const auto move = [&](float& to, float value) {
      // in double the difference of two floats cannot overflow, and a constant stays exactly itself
      const double old = to;
      to = first ? value : static_cast<float>(old + *momentum * (value - old));
    };
    move(out.low[c], found.low[c]);
    move(out.high[c], found.high[c]);
  }
  *out.nonfinite += *found.nonfinite;
}

qat::HistogramOut histogram_state(const Tensor& counts, const Tensor& low, const Tensor& high, const Tensor& nonfinite,
                                  int64_t channels, int64_t mantissa_bits) {
  check(mantissa_bits >= 0 && mantissa_bits <= 10,
        "mantissa_bits " + std::to_string(mantissa_bits) + " is outside [0, 10]; choose one of these");
  check_state(counts, "counts", ScalarType::Long, channels << (9 + mantissa_bits));
  return {counts.mutable_data_ptr<int64_t>(), static_cast<int>(mantissa_bits),
          state(low, high, nonfinite, channels).out()};
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

std::tuple<Tensor, Tensor> fake_quantize_histogram_forward(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin,
                                                           int64_t qmax, Tensor counts, Tensor low, Tensor high,
                                                           Tensor nonfinite, int64_t mantissa_bits, bool with_mask) {
  check_values(x, "x");
  const qat::Range range = code_range(qmin, qmax);
  const qat::HistogramOut out = histogram_state(counts, low, high, nonfinite, 1, mantissa_bits);
  const float s = grid_values(scale, "scale", 1, x)[0], z = grid_values(zero_point, "zero_point", 1, x)[0];
  Tensor y = torch::stable::empty_like(x);
  const Tensor bits = new_cpu({with_mask ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
  if (x.numel() == 0) return {y, bits};
  const Tensor from = dense(x, y);
  uint8_t* const to = with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::fake_quantize_histogram<T>(kernels(), parallel, torch::stable::get_num_threads(),
                                    static_cast<const T*>(from.const_data_ptr()),
                                    static_cast<T*>(y.mutable_data_ptr()), to, x.numel(), s, z, range, out);
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> clip_ranges(Tensor counts, Tensor low, Tensor high, int64_t mantissa_bits,
                                       double negative_weight, double margin, int64_t qmin, int64_t qmax,
                                       bool symmetric, int64_t middle, bool power_of_two) {
  check(mantissa_bits >= 0 && mantissa_bits <= 10,
        "mantissa_bits " + std::to_string(mantissa_bits) + " is outside [0, 10]; choose one of these");
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
  m.def("fake_quantize_histogram_forward(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, "
        "Tensor(a!) counts, Tensor(b!) low, Tensor(c!) high, Tensor(d!) nonfinite, int mantissa_bits=7, "
        "bool with_mask=True) -> (Tensor, Tensor)");
  m.def("clip_ranges(Tensor counts, Tensor low, Tensor high, int mantissa_bits, float negative_weight, float margin, "
        "int qmin, int qmax, bool symmetric, int middle, bool power_of_two) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_range", TORCH_BOX(&observe_range));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
  m.impl("clip_ranges", TORCH_BOX(&clip_ranges));
  m.impl("fake_quantize_histogram_forward", TORCH_BOX(&fake_quantize_histogram_forward));
}
