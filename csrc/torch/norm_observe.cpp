// Registration of the fused passes of calibration: batch norm or addition, activation, statistics of the result.
#include <cmath>

#include "../kernels/norm_observe.h"
#include "norm_arguments.h"
#include "observer_state.h"

namespace {

using namespace qat::ops;

// x, in the order of memory of y, which it may be.
Tensor in_order_of(const Tensor& x, const Tensor& y, const char* name) {
  std::vector<int64_t> strides(static_cast<size_t>(y.dim()));
  for (int64_t d = 0; d < y.dim(); ++d) strides[static_cast<size_t>(d)] = y.stride(d);
  check(same_shape(x, y) && is_dense(y),
        "y of shape " + shape_of(y) + " does not fit " + name + " of shape " + shape_of(x) +
            "; give a dense tensor of its shape");
  if (same_order(x, strides)) return x;
  Tensor copy = torch::stable::empty_like(y);
  torch::stable::copy_(copy, x);
  return copy;
}

qat::Range range_of(double low, double high) { return {static_cast<float>(low), static_cast<float>(high)}; }

void norm_observe(Tensor x, OptionalTensor gamma, OptionalTensor beta, Tensor running_mean, Tensor running_var,
                  double eps, double low_bound, double high_bound, Tensor y, Tensor low, Tensor high, Tensor nonfinite,
                  OptionalTensor counts, int64_t mantissa_bits, std::optional<double> momentum) {
  check_float(x, "x");
  check_float(y, "y");
  check(x.dim() >= 2 && x.numel() > 0,
        "x of shape " + shape_of(x) + " has no channels or no elements; give (N, C, ...)");
  const Statistics statistics(x, -1, low, high, nonfinite, counts, mantissa_bits, momentum);
  const int64_t channels = x.size(1);
  const std::vector<float> weight = by_channel(gamma, "gamma", channels, 1.0f);
  const std::vector<float> bias = by_channel(beta, "beta", channels, 0.0f);
  const std::vector<float> mean = by_channel(running_mean, "running_mean", channels, 0.0f);
  const std::vector<float> variance = by_channel(running_var, "running_var", channels, 1.0f);
  const Tensor from = in_order_of(x, y, "x");
  std::vector<float> factor(weight.size()), shift(weight.size());
  for (size_t c = 0; c < weight.size(); ++c) {
    factor[c] = 1.0f / std::sqrt(variance[c] + static_cast<float>(eps)) * weight[c];
    shift[c] = bias[c] - mean[c] * factor[c];
  }
  statistics.take([&](const qat::HistogramOut& out) {
    qat::norm_observe(kernels(), parallel, torch::stable::get_num_threads(), from.const_data_ptr<float>(),
                      y.mutable_data_ptr<float>(), layout_of(y, 1),
                      {factor.data(), shift.data(), range_of(low_bound, high_bound), nullptr, {0.0f, 1.0f}}, out);
  });
}

void add_observe(Tensor x, Tensor other, double low_bound, double high_bound, Tensor y, Tensor low, Tensor high,
                 Tensor nonfinite, OptionalTensor counts, int64_t mantissa_bits, std::optional<double> momentum) {
  check_float(x, "x");
  check_float(other, "other");
  check_float(y, "y");
  const Statistics statistics(x, -1, low, high, nonfinite, counts, mantissa_bits, momentum);
  const Tensor from = in_order_of(x, y, "x"), second = in_order_of(other, y, "other");
  if (x.numel() == 0) return;
  statistics.take([&](const qat::HistogramOut& out) {
    qat::add_observe(kernels(), parallel, torch::stable::get_num_threads(), from.const_data_ptr<float>(),
                     second.const_data_ptr<float>(), y.mutable_data_ptr<float>(), y.numel(),
                     range_of(low_bound, high_bound), out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("norm_observe(Tensor x, Tensor? gamma, Tensor? beta, Tensor running_mean, Tensor running_var, float eps, "
        "float low_bound, float high_bound, Tensor(a!) y, Tensor(b!) low, Tensor(c!) high, Tensor(d!) nonfinite, "
        "Tensor(e!)? counts, int mantissa_bits=7, float? momentum=None) -> ()");
  m.def("add_observe(Tensor x, Tensor other, float low_bound, float high_bound, Tensor(a!) y, Tensor(b!) low, "
        "Tensor(c!) high, Tensor(d!) nonfinite, Tensor(e!)? counts, int mantissa_bits=7, float? momentum=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("norm_observe", TORCH_BOX(&norm_observe));
  m.impl("add_observe", TORCH_BOX(&add_observe));
}
