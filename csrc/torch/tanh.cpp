// Registration of the transformation of DoReFa's weights.
#include "../kernels/tanh.h"

#include "norm_arguments.h"

namespace {

using namespace qat::ops;

std::tuple<Tensor, Tensor> tanh_weight_forward(Tensor weight) {
  check_float(weight, "weight");
  Tensor y = torch::stable::empty_like(weight), ratio = new_cpu({}, ScalarType::Float);
  float* const to = ratio.mutable_data_ptr<float>();
  *to = 1.0f;
  if (weight.numel() == 0) return {y, ratio};
  const Tensor from = dense(weight, y);
  *to = qat::tanh_weight(kernels(), parallel, from.const_data_ptr<float>(), y.mutable_data_ptr<float>(), from.numel());
  return {y, ratio};
}

Tensor tanh_weight_backward(Tensor grad, Tensor weight, Tensor ratio) {
  check_float(grad, "grad");
  check_float(weight, "weight");
  check_float(ratio, "ratio");
  check(same_shape(grad, weight) && ratio.numel() == 1,
        "grad of shape " + shape_of(grad) + " or ratio of shape " + shape_of(ratio) + " does not fit a weight of shape " +
            shape_of(weight) + "; give those of one forward pass");
  Tensor dw = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return dw;
  const Tensor from = dense(weight, dw), given = in_order_of(grad, from);
  qat::tanh_weight_gradient(kernels(), parallel, given.const_data_ptr<float>(), from.const_data_ptr<float>(),
                            *ratio.const_data_ptr<float>(), dw.mutable_data_ptr<float>(), from.numel());
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("tanh_weight_forward(Tensor weight) -> (Tensor, Tensor)");
  m.def("tanh_weight_backward(Tensor grad, Tensor weight, Tensor ratio) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("tanh_weight_forward", TORCH_BOX(&tanh_weight_forward));
  m.impl("tanh_weight_backward", TORCH_BOX(&tanh_weight_backward));
}
