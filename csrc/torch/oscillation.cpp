// Registration of a step of the tracking of oscillating weights.
#include "../kernels/oscillation.h"

#include "weight_factor.h"

namespace {

using namespace qat::ops;

void check_element_state(const Tensor& tensor, const char* name, ScalarType type, const Tensor& weight) {
  check_cpu(tensor, name);
  check(tensor.scalar_type() == type && tensor.numel() == weight.numel() && tensor.dim() == weight.dim() &&
            same_order(tensor, strides_of(weight)) && sizes_of(tensor) == sizes_of(weight),
        std::string(name) + " does not fit a weight of shape " + shape_of(weight) +
            "; give the state of this weight, of its type and in the weight's order of memory");
}

void oscillation_step(Tensor weight, Tensor codes, Tensor direction, Tensor average, Tensor frequency, Tensor frozen,
                      Tensor held, Tensor scale, Tensor zero_point, OptionalTensor gamma, OptionalTensor var, double eps,
                      double gamma_floor, int64_t qmin, int64_t qmax, double momentum,
                      std::optional<double> threshold, bool spares_ends, bool by_value) {
  check_cpu(weight, "weight");
  check(weight.scalar_type() == ScalarType::Float, "weight is not float32; give a float32 tensor");
  const int64_t rows = rows_of(weight);
  const int64_t inner = rows == 0 ? 0 : weight.numel() / rows;
  check(weight.dim() > 0 && (weight.numel() == 0 || (is_dense(weight) && (rows == 1 || weight.stride(0) == inner))),
        "weight of shape " + shape_of(weight) + " is not dense with one output channel after the other; use the "
        "PyTorch path");
  check(qmin >= -32768 && qmax <= 32767, "codes beyond 16 bits; use a range of int16");
  const qat::Range range = code_range(qmin, qmax);
  check_element_state(codes, "codes", ScalarType::Short, weight);
  check_element_state(direction, "direction", ScalarType::Char, weight);
  check_element_state(average, "average", ScalarType::Float, weight);
  check_element_state(frequency, "frequency", ScalarType::Float, weight);
  check_element_state(frozen, "frozen", ScalarType::Bool, weight);
  check_element_state(held, "held", ScalarType::Float, weight);
  const bool by_row = scale.numel() != 1;
  const int64_t grids = by_row ? rows : 1;
  const std::vector<float> s = grid_values(scale, "scale", grids, weight);
  const std::vector<float> z = grid_values(zero_point, "zero_point", grids, weight);
  check(var.has_value() || !gamma.has_value(), "gamma is given without var; give both, or neither");
  std::vector<float> factor;
  if (var.has_value()) factor = batch_norm_factor(gamma, *var, eps, gamma_floor, rows);
  if (weight.numel() == 0) return;
  const qat::OscillationState state{
      codes.mutable_data_ptr<int16_t>(),   direction.mutable_data_ptr<int8_t>(), average.mutable_data_ptr<float>(),
      frequency.mutable_data_ptr<float>(), frozen.mutable_data_ptr<bool>(),      held.mutable_data_ptr<float>()};
  const qat::OscillationRule rule{static_cast<float>(momentum), threshold.has_value(),
                                  static_cast<float>(threshold.value_or(0.0)), spares_ends, by_value};
  qat::oscillation_step(kernels(), parallel, weight.mutable_data_ptr<float>(), state, rows, inner, s.data(), z.data(),
                        by_row, var.has_value() ? factor.data() : nullptr, range, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("oscillation_step(Tensor(a!) weight, Tensor(b!) codes, Tensor(c!) direction, Tensor(d!) average, "
        "Tensor(e!) frequency, Tensor(f!) frozen, Tensor(g!) held, Tensor scale, Tensor zero_point, Tensor? gamma, "
        "Tensor? var, float eps, float gamma_floor, int qmin, int qmax, float momentum, float? threshold, bool spares_ends, bool by_value) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) { m.impl("oscillation_step", TORCH_BOX(&oscillation_step)); }
