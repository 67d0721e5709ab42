// What one element adds to the sums of a channel, in float64 as on the CPU.
#pragma once

#include "elements.h"

namespace qat::cuda {

struct Pair {
  double first, second;

  QAT_HD void clear() { first = second = 0.0; }
  QAT_HD void add(float a, float b) {
    first += static_cast<double>(a);
    second += static_cast<double>(b);
  }
  QAT_HD void merge(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

// Sum, sum of squares and extrema. A nan is in the sum, whatever the extrema are then.
struct Moments {
  double sum, square;
  float low, high;

  QAT_HD void clear() {
    sum = square = 0.0;
    low = infinity();
    high = -infinity();
  }
  QAT_HD void add(float x) {
    const double v = static_cast<double>(x);
    sum += v;
    square += v * v;
    low = smaller(low, x);
    high = larger(high, x);
  }
  QAT_HD void merge(const Moments& other) {
    sum += other.sum;
    square += other.square;
    low = smaller(low, other.low);
    high = larger(high, other.high);
  }
};

// Of batch norm's gradient: g, and g times x.
QAT_HD void add_product(Pair& sums, float grad, float x) {
  sums.first += static_cast<double>(grad);
  sums.second += static_cast<double>(grad) * static_cast<double>(x);
}

// Of batch norm's gradient and of a learned grid's.
struct Quad {
  Pair products, grid;

  QAT_HD void clear() {
    products.clear();
    grid.clear();
  }
  QAT_HD void merge(const Quad& other) {
    products.merge(other.products);
    grid.merge(other.grid);
  }
};

struct LearnedTerms {
  float scale, zero_point;  // d(y)/d(...) times the gradient
  bool inside;              // the gradient passes to x
};

// Esser et al., "Learned Step Size Quantization" (ICLR 2020), and Bhalgat et al., "LSQ+" (CVPR workshops 2020). nan adds
// nothing.
QAT_HD LearnedTerms learned_terms(float x, float grad, float scale, float zero_point, Range range) {
  const float quotient = divide(x, scale);
  const float steps = round_even(quotient);
  if (is_nan(steps)) return {0.0f, 0.0f, false};
  const float code = steps + zero_point, clamped = smaller(larger(code, range.low), range.high);
  const float reached = clamped - zero_point;
  if (code == clamped) return {grad * (reached - quotient), 0.0f, true};
  return {grad * reached, grad * (0.0f - scale), false};
}

// Whether a value lies between the ends of the grid, or on one.
QAT_HD bool between_ends(float x, float scale, float zero_point, Range range) {
  return (range.low - zero_point) * scale <= x && x <= (range.high - zero_point) * scale;
}

// Of a learned clip: Choi et al., "PACT" (2018).
QAT_HD LearnedTerms clip_terms(float x, float grad, float scale, float zero_point, Range range) {
  if (is_nan(x)) return {0.0f, 0.0f, false};
  if (between_ends(x, scale, zero_point, range)) return {0.0f, 0.0f, true};
  // a grid has zero on it, so what is clipped at its lower end is negative
  return {grad * ((x < 0.0f ? range.low : range.high) - zero_point), 0.0f, false};
}

QAT_HD LearnedTerms grid_terms(float x, float grad, float scale, float zero_point, Range range, bool clips) {
  return clips ? clip_terms(x, grad, scale, zero_point, range) : learned_terms(x, grad, scale, zero_point, range);
}

// A learned zero point is any number; the grid has the nearest code.
QAT_HD float nearest_code(float zero_point, Range range) {
  return smaller(larger(round_even(zero_point), range.low), range.high);
}

}  // namespace qat::cuda
