// Registration of the fused passes of training on learned grids: batch norm or addition, activation, fake quantization.
#include "../kernels/norm_learned.h"

#include "learned_grid.h"
#include "norm_passes.h"

namespace {

using namespace qat::ops;

struct Learned {
  Learned(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax, bool clips,
          const OptionalTensor& seed, double probability)
      : clips(clips), drop(drop_of(seed, probability)) {
    const LearnedGrid made = learned_grid(x, scale, zero_point, qmin, qmax, -1);
    grid = {made.scale[0], static_cast<int32_t>(made.zero_point[0])};
    range = made.range;
  }

  Quantizer quantizer() const {
    Quantizer made(grid, range, clips);
    made.drop = drop;
    return made;
  }

  qat::NormPass pass(const float* factor, const float* shift, qat::Range bounds) const {
    return {factor, shift, bounds, &grid, range, clips, drop ? &*drop : nullptr};
  }

  qat::CodeGrid grid{};
  qat::Range range{};
  bool clips;
  std::optional<qat::Drop> drop;
};

struct GridGradients {
  Tensor scale, zero_point;
};

GridGradients gradients_of(const qat::GridSums& sums, const Tensor& scale, const Tensor& zero_point,
                           double grad_scale, bool with_zero_point) {
  const GridGradients made{
      new_cpu(sizes_of(scale), ScalarType::Float),
      new_cpu(with_zero_point ? sizes_of(zero_point) : std::vector<int64_t>{0}, ScalarType::Float)};
  write_sums({sums.scale}, grad_scale, made.scale);
  if (with_zero_point) write_sums({sums.zero_point}, grad_scale, made.zero_point);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize_learned_forward(
    Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var,
    bool batch_statistics, double momentum, double eps, double low_bound, double high_bound, Tensor scale,
    Tensor zero_point, int64_t qmin, int64_t qmax, bool with_mask, bool clips, OptionalTensor seed, double drop) {
  const Learned learned(x, scale, zero_point, qmin, qmax, clips, seed, drop);
  return norm_forward(x, {gamma, beta, running_mean, running_var, batch_statistics, momentum, eps},
                      bounds_of(low_bound, high_bound), learned.quantizer(), with_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_quantize_learned_backward(
    Tensor grad, Tensor x, Tensor mask_bits, OptionalTensor gamma, OptionalTensor beta, Tensor mean, Tensor invstd,
    bool batch_statistics, double low_bound, double high_bound, Tensor scale, Tensor zero_point, int64_t qmin,
    int64_t qmax, double grad_scale, bool with_zero_point, bool clips, OptionalTensor seed, double drop) {
  const Learned learned(x, scale, zero_point, qmin, qmax, clips, seed, drop);
  qat::GridSums grid_sums{};
  const Saved saved{x, mask_bits, gamma, mean, invstd, batch_statistics};
  const auto [dx, dgamma, dbeta] = norm_backward(
      grad, saved, true,
      [&](const float* g, const float* data, const qat::Layout& layout, double* sum, double* product) {
        const int64_t channels = layout.channels;
        const Lines lines =
            lines_of(by_channel(mean, "mean", channels, 0.0f), by_channel(invstd, "invstd", channels, 0.0f),
                     by_channel(gamma, "gamma", channels, 1.0f), by_channel(beta, "beta", channels, 0.0f));
        const qat::NormPass pass =
            learned.pass(lines.factor.data(), lines.shift.data(), bounds_of(low_bound, high_bound));
        grid_sums = qat::learned_gradient_sums(kernels(), parallel, g, data, layout, pass, with_zero_point, sum,
                                               product);
      });
  const GridGradients of_grid = gradients_of(grid_sums, scale, zero_point, grad_scale, with_zero_point);
  return {dx, dgamma, dbeta, of_grid.scale, of_grid.zero_point};
}

// grad_scale is for the gradient only, which is registered in Python.
Tensor add_quantize_learned_forward(Tensor x, Tensor other, double low_bound, double high_bound, Tensor scale,
                                    Tensor zero_point, int64_t qmin, int64_t qmax, double, bool clips,
                                    OptionalTensor seed, double drop) {
  const Learned learned(x, scale, zero_point, qmin, qmax, clips, seed, drop);
  return std::get<0>(add_forward(x, other, bounds_of(low_bound, high_bound), learned.quantizer(), false));
}

std::tuple<Tensor, Tensor, Tensor> add_quantize_learned_backward(Tensor grad, Tensor x, Tensor other, double low_bound,
                                                                 double high_bound, Tensor scale, Tensor zero_point,
                                                                 int64_t qmin, int64_t qmax, double grad_scale,
                                                                 bool with_zero_point, bool clips,
                                                                 OptionalTensor seed, double drop) {
  check_float(grad, "grad");
  check_float(x, "x");
  check_float(other, "other");
  check(same_shape(x, other) && same_shape(x, grad),
        "grad of shape " + shape_of(grad) + " and other of shape " + shape_of(other) + " do not fit x of shape " +
            shape_of(x) + "; give those of one forward pass");
  const Learned learned(x, scale, zero_point, qmin, qmax, clips, seed, drop);
  Tensor dx = torch::stable::empty_like(x);
  qat::GridSums sums{};
  if (x.numel() > 0) {
    const Tensor from = dense(x, dx), second = in_order_of(other, from), gradient = in_order_of(grad, from);
    sums = qat::add_learned_gradient(kernels(), parallel, gradient.const_data_ptr<float>(),
                                     from.const_data_ptr<float>(), second.const_data_ptr<float>(),
                                     dx.mutable_data_ptr<float>(), x.numel(),
                                     learned.pass(nullptr, nullptr, bounds_of(low_bound, high_bound)),
                                     with_zero_point);
  }
  const GridGradients of_grid = gradients_of(sums, scale, zero_point, grad_scale, with_zero_point);
  return {dx, of_grid.scale, of_grid.zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("norm_quantize_learned_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, bool batch_statistics, float momentum, float eps, float low_bound, float high_bound, "
        "Tensor scale, Tensor zero_point, int qmin, int qmax, bool with_mask=True, "
        "bool clips=False, Tensor? seed=None, float drop=0.0) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_quantize_learned_backward(Tensor grad, Tensor x, Tensor mask_bits, Tensor? gamma, Tensor? beta, "
        "Tensor mean, Tensor invstd, bool batch_statistics, float low_bound, float high_bound, Tensor scale, "
        "Tensor zero_point, int qmin, int qmax, float grad_scale=1.0, bool with_zero_point=True, "
        "bool clips=False, Tensor? seed=None, float drop=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("add_quantize_learned_forward(Tensor x, Tensor other, float low_bound, float high_bound, Tensor scale, "
        "Tensor zero_point, int qmin, int qmax, float grad_scale=1.0, bool clips=False, "
        "Tensor? seed=None, float drop=0.0) -> Tensor");
  m.def("add_quantize_learned_backward(Tensor grad, Tensor x, Tensor other, float low_bound, float high_bound, "
        "Tensor scale, Tensor zero_point, int qmin, int qmax, float grad_scale=1.0, bool with_zero_point=True, "
        "bool clips=False, Tensor? seed=None, float drop=0.0) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("norm_quantize_learned_forward", TORCH_BOX(&norm_quantize_learned_forward));
  m.impl("norm_quantize_learned_backward", TORCH_BOX(&norm_quantize_learned_backward));
  m.impl("add_quantize_learned_forward", TORCH_BOX(&add_quantize_learned_forward));
  m.impl("add_quantize_learned_backward", TORCH_BOX(&add_quantize_learned_backward));
}
