// Registration of fake quantization on grids that follow the data: weights, and activations in training.
#include "weight_factor.h"

namespace {

using namespace qat::ops;

std::tuple<Tensor, Tensor> fake_quantize_weight_forward(Tensor weight, std::optional<Tensor> scale,
                                                        std::optional<Tensor> zero_point, std::optional<Tensor> gamma,
                                                        std::optional<Tensor> var, double eps, double gamma_floor,
                                                        int64_t qmin, int64_t qmax, int64_t axis, bool symmetric,
                                                        int64_t middle, bool power_of_two, int64_t channel_axis,
                                                        int64_t groups, bool with_mask) {
  check_values(weight, "weight");
  check_axis(weight, axis);
  const qat::Range range = code_range(qmin, qmax);
  const qat::GridRule rule = rule_of(qmin, qmax, symmetric, middle, power_of_two);
  check(scale.has_value() == zero_point.has_value(),
        "one of scale and zero_point is missing; give both, or neither for a grid that follows the weight");
  const int64_t count = axis == -1 ? 1 : weight.size(axis);
  std::vector<float> s(static_cast<size_t>(count)), z(static_cast<size_t>(count));
  if (scale.has_value()) {
    s = grid_values(*scale, "scale", count, weight);
    z = grid_values(*zero_point, "zero_point", count, weight);
  }
  Tensor y = torch::stable::empty_like(weight);
  const Tensor bits = new_cpu({with_mask ? (weight.numel() + 7) / 8 : 0}, ScalarType::Byte);
  if (weight.numel() == 0) return {y, bits};
  const Tensor from = dense(weight, y);
  std::optional<WeightFactor> factor;
  check(var.has_value() || !gamma.has_value(), "gamma is given without var; give both, or neither");
  if (var.has_value()) {
    const int64_t outputs = outputs_of(weight, channel_axis, groups);
    factor.emplace(from, batch_norm_factor(gamma, *var, eps, gamma_floor, outputs), channel_axis, groups);
  }
  const qat::Layout layout = layout_of(from, axis);
  uint8_t* const to = with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  by_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    qat::fake_quantize_weight<T>(kernels(), parallel, static_cast<const T*>(from.const_data_ptr()),
                                 static_cast<T*>(y.mutable_data_ptr()), to, layout, factor ? &factor->factor : nullptr,
                                 s.data(), z.data(), scale.has_value() ? nullptr : &rule, range);
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_track_forward(Tensor x, Tensor low, Tensor high, Tensor scale,
                                                       Tensor zero_point, Tensor tracked, double momentum,
                                                       int64_t qmin, int64_t qmax, int64_t axis, bool symmetric,
                                                       int64_t middle, bool power_of_two, bool with_mask) {
  check_values(x, "x");
  check_axis(x, axis);
  const qat::Range range = code_range(qmin, qmax);
  const qat::GridRule rule = rule_of(qmin, qmax, symmetric, middle, power_of_two);
  const int64_t count = axis == -1 ? 1 : x.size(axis);
  check_state(low, "low", ScalarType::Float, count);
  check_state(high, "high", ScalarType::Float, count);
  check_state(scale, "scale", ScalarType::Float, count);
  check_state(zero_point, "zero_point", ScalarType::Int, count);
  check_state(tracked, "tracked", ScalarType::Long, 1);
  Tensor y = torch::stable::empty_like(x);
  const Tensor bits = new_cpu({with_mask ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
  *tracked.mutable_data_ptr<int64_t>() += rows_of(x);
  if (x.numel() == 0) return {y, bits};
  const Tensor from = dense(x, y);
  const qat::Layout layout = layout_of(from, axis);
  uint8_t* const to = with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  const qat::Tracked state{low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(),
                           scale.mutable_data_ptr<float>(), zero_point.mutable_data_ptr<int32_t>()};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const data = static_cast<const T*>(from.const_data_ptr());
    std::vector<float> lows(static_cast<size_t>(count)), highs(static_cast<size_t>(count));
    qat::whole_range<T>(kernels(), parallel, data, layout, lows.data(), highs.data());
    qat::track_range(lows.data(), highs.data(), count, static_cast<float>(momentum), rule, state);
    const std::vector<float> z(state.zero_point, state.zero_point + count);
    qat::fake_quantize<T>(kernels(), parallel, data, static_cast<T*>(y.mutable_data_ptr()), to, layout, state.scale,
                          z.data(), range, nullptr);
  });
  return {y, bits};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("fake_quantize_weight_forward(Tensor weight, Tensor? scale, Tensor? zero_point, Tensor? gamma, Tensor? var, "
        "float eps, float gamma_floor, int qmin, int qmax, int axis, bool symmetric, int middle, bool power_of_two, "
        "int channel_axis=0, int groups=1, bool with_mask=True) -> (Tensor, Tensor)");
  m.def("fake_quantize_track_forward(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) scale, "
        "Tensor(d!) zero_point, Tensor(e!) tracked, float momentum, int qmin, int qmax, int axis, bool symmetric, "
        "int middle, bool power_of_two, bool with_mask=True) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("fake_quantize_weight_forward", TORCH_BOX(&fake_quantize_weight_forward));
  m.impl("fake_quantize_track_forward", TORCH_BOX(&fake_quantize_track_forward));
}
