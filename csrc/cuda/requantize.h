// From accumulators to codes, the onnx profile of csrc/kernels/integer/requantize.h.
#pragma once

#include "host_device.h"

namespace qat::cuda {

struct Requantize {
  int32_t zero_point, qmin, qmax;  // of the layer's own result
  bool y_signed;                   // of what is stored
  // QLinearAdd of a residual: fma(left, left_ratio, fma(right, right_ratio, fixed)), see `Sum`.
  bool add, residual_first, residual_signed;
  float left_ratio, right_ratio, fixed;
  int32_t sum_qmin, sum_qmax;
};

QAT_HD int32_t requantize(int32_t acc, float multiplier, const Requantize& r) {
  const float low = static_cast<float>(r.qmin - r.zero_point), high = static_cast<float>(r.qmax - r.zero_point);
  const float steps = static_cast<float>(acc) * multiplier;
  return static_cast<int32_t>(round_even(smaller(larger(steps, low), high))) + r.zero_point;
}

QAT_HD int32_t add_codes(int32_t own, int32_t residual, const Requantize& r) {
  const int32_t left = r.residual_first ? residual : own, right = r.residual_first ? own : residual;
  const float total = fused(static_cast<float>(left), r.left_ratio,
                            fused(static_cast<float>(right), r.right_ratio, r.fixed));
  const float low = static_cast<float>(r.sum_qmin), high = static_cast<float>(r.sum_qmax);
  return static_cast<int32_t>(round_even(smaller(larger(total, low), high)));
}

QAT_HD int32_t code_of(uint8_t byte, bool is_signed) { return is_signed ? static_cast<int8_t>(byte) : byte; }

}  // namespace qat::cuda
