// Registration of the fused passes of training on static grids: batch norm, addition, activation, tracked range, fake
// quantization.
#include "norm_passes.h"

namespace {

using namespace qat::ops;

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize_forward(
    Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var,
    bool batch_statistics, double momentum, double eps, double low_bound, double high_bound, OptionalTensor low,
    OptionalTensor high, OptionalTensor scale, OptionalTensor zero_point, OptionalTensor tracked, bool track,
    double average, int64_t qmin, int64_t qmax, bool symmetric, int64_t middle, bool power_of_two, bool with_mask,
    OptionalTensor seed, double drop) {
  Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax, symmetric, middle,
                      power_of_two);
  quantizer.drop = drop_of(seed, drop);
  return norm_forward(x, {gamma, beta, running_mean, running_var, batch_statistics, momentum, eps},
                      bounds_of(low_bound, high_bound), quantizer, with_mask);
}

std::tuple<Tensor, Tensor, Tensor> norm_quantize_backward(Tensor grad, Tensor x, Tensor mask_bits, OptionalTensor gamma,
                                                          Tensor mean, Tensor invstd, bool batch_statistics,
                                                          bool with_parameters) {
  const Saved saved{x, mask_bits, gamma, mean, invstd, batch_statistics};
  return norm_backward(grad, saved, with_parameters,
                       [&](const float* g, const float* data, const qat::Layout& layout, double* sum, double* product) {
                         qat::gradient_sums(kernels(), parallel, g, mask_bits.const_data_ptr<uint8_t>(), data, layout,
                                            sum, product);
                       });
}

std::tuple<Tensor, Tensor> add_quantize_forward(Tensor x, Tensor other, double low_bound, double high_bound,
                                                OptionalTensor low, OptionalTensor high, OptionalTensor scale,
                                                OptionalTensor zero_point, OptionalTensor tracked, bool track,
                                                double average, int64_t qmin, int64_t qmax, bool symmetric,
                                                int64_t middle, bool power_of_two, bool with_mask,
                                                OptionalTensor seed, double drop) {
  Quantizer quantizer(low, high, scale, zero_point, tracked, track, average, qmin, qmax, symmetric, middle,
                      power_of_two);
  quantizer.drop = drop_of(seed, drop);
  return add_forward(x, other, bounds_of(low_bound, high_bound), quantizer, with_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("norm_quantize_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, bool batch_statistics, float momentum, float eps, float low_bound, float high_bound, "
        "Tensor(c!)? low, Tensor(d!)? high, Tensor(e!)? scale, Tensor(f!)? zero_point, Tensor(g!)? tracked, "
        "bool track, float average, "
        "int qmin, int qmax, bool symmetric, int middle, bool power_of_two, bool with_mask=True, "
        "Tensor? seed=None, float drop=0.0) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_quantize_backward(Tensor grad, Tensor x, Tensor mask_bits, Tensor? gamma, Tensor mean, Tensor invstd, "
        "bool batch_statistics, bool with_parameters) -> (Tensor, Tensor, Tensor)");
  m.def("add_quantize_forward(Tensor x, Tensor other, float low_bound, float high_bound, Tensor(c!)? low, "
        "Tensor(d!)? high, Tensor(e!)? scale, Tensor(f!)? zero_point, Tensor(g!)? tracked, bool track, float average, "
        "int qmin, int qmax, bool symmetric, int middle, bool power_of_two, bool with_mask=True, "
        "Tensor? seed=None, float drop=0.0) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("norm_quantize_forward", TORCH_BOX(&norm_quantize_forward));
  m.impl("norm_quantize_backward", TORCH_BOX(&norm_quantize_backward));
  m.impl("add_quantize_forward", TORCH_BOX(&add_quantize_forward));
}
