// What one element adds to the gradients of a grid and of batch norm.
#pragma once

#include "elements.h"

namespace qat::cuda {

struct Pair {
  float first, second;
};

// d(y)/d(scale) and d(y)/d(zero_point) times the gradient: Esser et al., "Learned Step Size Quantization" (ICLR 2020),
// and Bhalgat et al., "LSQ+" (CVPR workshops 2020). nan adds nothing.
QAT_HD Pair learned_terms(float x, float grad, float scale, float zero_point, Range range) {
  const float real_steps = divide(x, scale);
  const float steps = round_even(real_steps);
  if (is_nan(steps)) return {0.0f, 0.0f};
  const float code = steps + zero_point, clamped = smaller(larger(code, range.low), range.high);
  if (code == clamped) return {grad * (steps - real_steps), 0.0f};
  return {grad * (clamped - zero_point), -grad * scale};
}

QAT_HD float normalized(float x, float mean, float inverse) { return (x - mean) * inverse; }

// `activation`: 0 none, 1 ReLU, 2 ReLU6. The gradient passes strictly inside, as in PyTorch; nan stays nan.
QAT_HD float activate(float z, int activation, bool& passes) {
  passes = activation == 0 || (z > 0.0f && (activation == 1 || z < 6.0f));
  if (activation == 0 || is_nan(z)) return z;
  return activation == 1 ? larger(z, 0.0f) : smaller(larger(z, 0.0f), 6.0f);
}

// `count`: elements of the channel; with frozen statistics the sums play no part.
QAT_HD float norm_gradient(float grad, float normalized_x, float slope, float sum, float sum_x, float count,
                           bool frozen) {
  if (frozen) return slope * grad;
  return slope * (grad - divide(sum + normalized_x * sum_x, count));
}

// Element `position` of `channel` among outer * inner.
QAT_HD int64_t element_of(Layout layout, int64_t channel, int64_t position) {
  return (position / layout.inner * layout.channels + channel) * layout.inner + position % layout.inner;
}

}  // namespace qat::cuda
