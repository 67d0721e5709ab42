// Registration of the observers, and of observation in the same pass as fake quantization.
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

void check_double(const Tensor& tensor, const char* name, const Tensor& like) {
  check_cpu(tensor, name);
  check(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 2 && shape_of(tensor) == shape_of(like),
        std::string(name) + " of shape " + shape_of(tensor) + " is not float64 of shape " + shape_of(like) +
            "; give two dimensions, channels first");
}

Tensor clip_errors(Tensor points, Tensor jumps, Tensor scale, Tensor low, Tensor high) {
  check_double(points, "points", points);
  check_double(jumps, "jumps", points);
  check_double(scale, "scale", scale);
  check_double(low, "low", scale);
  check_double(high, "high", scale);
  check(points.size(0) == scale.size(0), "scale has " + std::to_string(scale.size(0)) + " channels and points " +
                                             std::to_string(points.size(0)) + "; give the same channels");
  Tensor out = new_cpu({scale.size(0), scale.size(1)}, ScalarType::Double);
  const auto data = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  const Tensor p = torch::stable::contiguous(points), j = torch::stable::contiguous(jumps);
  const Tensor s = torch::stable::contiguous(scale), l = torch::stable::contiguous(low);
  const Tensor h = torch::stable::contiguous(high);
  if (out.numel() == 0) return out;
  qat::clip_errors(kernels(), parallel, data(p), data(j), points.size(0), points.size(1), data(s), data(l), data(h),
                   scale.size(1), static_cast<double*>(out.mutable_data_ptr()));
  return out;
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
  m.def("clip_errors(Tensor points, Tensor jumps, Tensor scale, Tensor low, Tensor high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe_range", TORCH_BOX(&observe_range));
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
  m.impl("clip_errors", TORCH_BOX(&clip_errors));
  m.impl("fake_quantize_histogram_forward", TORCH_BOX(&fake_quantize_histogram_forward));
}
