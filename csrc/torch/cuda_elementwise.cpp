// The operators of dropping.cpp and tanh.cpp on the GPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_norm.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

Tensor drop_numbers(Tensor like, Tensor seed) {
  const Device device(like);
  check_float(like, "like", device.index);
  const std::optional<qat::Drop> drop = drop_of(seed, 1.0);
  const Tensor numbers = torch::stable::empty_like(like);
  if (like.numel() == 0) return numbers;
  check_launch(qat::cuda::place_numbers(drop->seed, numbers.mutable_data_ptr<float>(), numbers.numel(), device.stream),
               "drop_numbers");
  return numbers;
}

std::tuple<Tensor, Tensor> tanh_weight_forward(Tensor weight) {
  const Device device(weight);
  check_float(weight, "weight", device.index);
  const Tensor y = torch::stable::empty_like(weight);
  Tensor ratio = new_cuda(weight, {}, ScalarType::Float);
  if (weight.numel() == 0) return {y, torch::stable::fill_(ratio, 1.0)};
  const Tensor from = dense(weight, y);
  const float* const data = from.const_data_ptr<float>();
  const int64_t n = from.numel();
  const ExtremaTensors extrema = new_extrema(from, -1, device.stream);
  check_launch(qat::cuda::observe_extrema<float>(data, {1, 1, n}, extrema.out(), device.stream), "observe_extrema");
  check_launch(qat::cuda::include_nonfinite<float>(data, {1, 1, n}, extrema.out(), device.stream),
               "include_nonfinite");
  check_launch(qat::cuda::tanh_weight(data, y.mutable_data_ptr<float>(), n, extrema.low.const_data_ptr<float>(),
                                      extrema.high.const_data_ptr<float>(), ratio.mutable_data_ptr<float>(),
                                      device.stream),
               "tanh_weight_forward");
  return {y, ratio};
}

Tensor tanh_weight_backward(Tensor grad, Tensor weight, Tensor ratio) {
  const Device device(weight);
  check_float(grad, "grad", device.index);
  check_float(weight, "weight", device.index);
  check_float(ratio, "ratio", device.index);
  check(sizes_of(grad) == sizes_of(weight) && ratio.numel() == 1,
        "grad of shape " + shape_of(grad) + " or ratio of shape " + shape_of(ratio) + " does not fit a weight of shape " +
            shape_of(weight) + "; give those of one forward pass");
  const Tensor dw = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return dw;
  const Tensor from = dense(weight, dw), given = in_order_of(grad, from);
  check_launch(qat::cuda::tanh_weight_gradient(given.const_data_ptr<float>(), from.const_data_ptr<float>(),
                                               ratio.const_data_ptr<float>(), dw.mutable_data_ptr<float>(),
                                               from.numel(), device.stream),
               "tanh_weight_backward");
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("drop_numbers", TORCH_BOX(&drop_numbers));
  m.impl("tanh_weight_forward", TORCH_BOX(&tanh_weight_forward));
  m.impl("tanh_weight_backward", TORCH_BOX(&tanh_weight_backward));
}
