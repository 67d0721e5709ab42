// Batch norm: what becomes of the sums of a channel, and what the passes do with eight elements.
//
// The operations of csrc/torch/norm.cpp and csrc/kernels/norm_loops.h, in their order.
#pragma once

#include "../kernels/norm.h"
#include "elements.h"
#include "terms.h"

namespace qat::cuda {

// ---- by channel

struct Statistics {
  double center, spread;  // mean, biased variance
  float mean, inverse;    // rounded; 1 / sqrt(spread + eps)
};

QAT_HD Statistics statistics_of(const Moments& m, double count, double eps) {
  const double center = m.sum / count, variance = m.square / count - center * center;
  // a nan is no smaller than zero
  const double spread = m.sum != m.sum ? m.sum : variance < 0.0 ? 0.0 : variance;
  return {center, spread, static_cast<float>(center), static_cast<float>(1.0 / root(spread + eps))};
}

QAT_HD float moved_statistic(float held, double value, double momentum) {
  return static_cast<float>((1.0 - momentum) * static_cast<double>(held) + momentum * value);
}

QAT_HD float frozen_inverse(float variance, float eps) { return divide(1.0f, root(variance + eps)); }

// v = x * factor + shift
struct Line {
  float factor, shift;
};

QAT_HD Line line_of(float mean, float inverse, float gamma, float beta) {
  const float factor = inverse * gamma;
  return {factor, beta - mean * factor};
}

QAT_HD float on_line(float x, Line line) { return x * line.factor + line.shift; }

// The range that a monotone function makes of the extrema of channels, by the operations that elements go through.
struct Reached {
  float least, most;
  bool numbers;  // none was nan

  QAT_HD void clear() {
    least = infinity();
    most = -infinity();
    numbers = true;
  }
  QAT_HD void add(float x, Line line) {
    const float v = on_line(x, line);
    if (is_nan(v)) {
      numbers = false;
      return;
    }
    least = smaller(least, v);
    most = larger(most, v);
  }
  QAT_HD void merge(const Reached& other) {
    least = smaller(least, other.least);
    most = larger(most, other.most);
    numbers = numbers && other.numbers;
  }
  // nan where one was.
  QAT_HD Range clamped(Range bounds) const {
    if (!numbers) return {float_of(0x7fc00000u), float_of(0x7fc00000u)};
    return {smaller(larger(least, bounds.low), bounds.high) + 0.0f,
            smaller(larger(most, bounds.low), bounds.high) + 0.0f};
  }
};

// dx = factor * grad + ((x - center) * slope + offset), where the last two are still to be divided by the count.
struct Slope {
  float factor, dgamma, dbeta;
  double slope, offset;
};

QAT_HD Slope slope_of(const Pair& sums, float mean, float inverse, float gamma) {
  const float factor = gamma * inverse;
  const double i = inverse, a = factor;
  const double normalized = (sums.second - static_cast<double>(mean) * sums.first) * i;
  return {factor, static_cast<float>(normalized), static_cast<float>(sums.first), -a * i * normalized,
          -a * sums.first};
}

QAT_HD float norm_gradient(float grad, float x, float factor, float slope, float center, float offset) {
  return grad * factor + ((x - center) * slope + offset);
}

// ---- by element

// A threshold of 0 leaves nothing out.
struct DroppingSteps : NormSteps {
  Drop drop;
};

QAT_HD bool is_dropped(const Drop& drop, int64_t place) {
  if (!(drop.threshold > 0.0f)) return false;
  return place_number(drop_key(drop.seed, place), static_cast<uint32_t>(place)) < drop.threshold;
}

// Clamps, and fake-quantizes where the steps say so; `inside`: strictly between the bounds, and the gradient of the grid
// passes. `place`: of the element in memory.
QAT_HD Quantized norm_steps(float v, const DroppingSteps& steps, int64_t place) {
  const bool inside = steps.low < v && v < steps.high;
  const float raised = v > steps.low ? v : steps.low;
  // activations let nan through
  const float clamped = is_nan(v) ? v : raised < steps.high ? raised : steps.high;
  if (!steps.quantize || is_dropped(steps.drop, place)) return {clamped, inside};
  const Quantized q = fake_quantize(clamped, steps.scale, steps.zero_point, steps.codes);
  const bool passes = steps.clips ? between_ends(clamped, steps.scale, steps.zero_point, steps.codes) : q.inside;
  return {q.value, inside && passes};
}

// The gradients of steps that quantize.
QAT_HD LearnedTerms norm_learned_terms(float v, float grad, const DroppingSteps& steps, int64_t place) {
  if (is_nan(v)) return {0.0f, 0.0f, false};
  const bool inside = steps.low < v && v < steps.high;
  if (is_dropped(steps.drop, place)) return {0.0f, 0.0f, inside};
  const float clamped = smaller(larger(v, steps.low), steps.high);
  LearnedTerms terms = grid_terms(clamped, grad, steps.scale, steps.zero_point, steps.codes, steps.clips);
  terms.inside = terms.inside && inside;
  return terms;
}

// The values of the elements' channels.
template <class Index>
QAT_HD void spread(Octet<float>& to, const float* values, int count, Channel<Index> at) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) {
    to.value[i] = i < count ? values[at.channel] : 0.0f;
    at.next();
  }
}

// Applies lines and steps in place, and returns the bits. `place`: of the first element in memory.
QAT_HD uint8_t norm_octet(Octet<float>& x, int count, const Octet<float>& factor, const Octet<float>& shift,
                          const DroppingSteps& steps, int64_t place) {
  uint32_t bits = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) {
    if (i >= count) break;
    const Quantized q = norm_steps(on_line(x.value[i], {factor.value[i], shift.value[i]}), steps, place + i);
    x.value[i] = q.value;
    bits |= static_cast<uint32_t>(q.inside) << i;
  }
  return static_cast<uint8_t>(bits);
}

// The same of sums.
QAT_HD uint8_t add_octet(Octet<float>& x, const Octet<float>& other, int count, const DroppingSteps& steps,
                         int64_t place) {
  uint32_t bits = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) {
    if (i >= count) break;
    const Quantized q = norm_steps((x.value[i] + other.value[i]) + 0.0f, steps, place + i);
    x.value[i] = q.value;
    bits |= static_cast<uint32_t>(q.inside) << i;
  }
  return static_cast<uint8_t>(bits);
}

}  // namespace qat::cuda
