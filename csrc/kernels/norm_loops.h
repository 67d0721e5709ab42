// The loops of `NormKernels`, over a vector type V; what holds for training_loops.h holds here.
#pragma once

#include "drop_loops.h"
#include "learned_loops.h"
#include "oscillation_loops.h"

namespace qat {
namespace {

template <class V>
inline typename V::Float norm_vector(typename V::Float x, typename V::Float factor, typename V::Float shift,
                                     typename V::Float low, typename V::Float high, typename V::Mask& inside) {
  const auto v = V::add(V::mul(x, factor), shift);
  inside = V::both(V::less(low, v), V::less(v, high));
  // activations let nan through
  return V::select(V::ordered(v), V::min(V::max(v, low), high), v);
}

struct OneAffine {
  float factor, shift;
  template <class V>
  typename V::Float factor_at(int64_t) const {
    return V::set(factor);
  }
  template <class V>
  typename V::Float shift_at(int64_t) const {
    return V::set(shift);
  }
};

struct EachAffine {
  const float *factor, *shift;
  template <class V>
  typename V::Float factor_at(int64_t i) const {
    return V::load(factor + i);
  }
  template <class V>
  typename V::Float shift_at(int64_t i) const {
    return V::load(shift + i);
  }
};

inline OneAffine tail(const OneAffine& affine, int64_t, int64_t, float*) { return affine; }
inline EachAffine tail(const EachAffine& affine, int64_t i, int64_t rest, float* buffer) {
  std::memcpy(buffer, affine.factor + i, static_cast<size_t>(rest) * sizeof(float));
  std::memcpy(buffer + 16, affine.shift + i, static_cast<size_t>(rest) * sizeof(float));
  return {buffer, buffer + 16};
}

template <class V, bool Quantize, bool Clips, class Affine>
inline void norm_loop(const float* x, float* y, uint8_t* bits, int64_t n, const Affine& affine,
                      const NormSteps& steps) {
  const auto low = V::set(steps.low), high = V::set(steps.high);
  const auto scale = V::set(steps.scale), zero_point = V::set(steps.zero_point);
  const auto first = V::set(steps.codes.low), last = V::set(steps.codes.high);
  const auto compute = [&](typename V::Float v, const auto& with, int64_t i, typename V::Mask& inside) {
    const auto factor = with.template factor_at<V>(i), shift = with.template shift_at<V>(i);
    const auto clamped = norm_vector<V>(v, factor, shift, low, high, inside);
    if (!Quantize) return clamped;
    typename V::Mask coded;
    const auto out = quantize_vector<V>(clamped, scale, zero_point, first, last, coded);
    if (Clips) coded = between_ends<V>(clamped, scale, zero_point, first, last);
    inside = V::both(inside, coded);
    return out;
  };
  typename V::Mask inside;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    V::store(y + i, compute(V::load(x + i), affine, i, inside));
    if (bits != nullptr) store_bits<V>(bits + i / 8, V::bits(inside));
  }
  if (i == n) return;
  const int64_t rest = n - i;
  float buffer[V::width], affines[32] = {};
  copy_in<V>(buffer, x + i, rest);
  V::store(buffer, compute(V::load(buffer), tail(affine, i, rest, affines), 0, inside));
  std::memcpy(y + i, buffer, static_cast<size_t>(rest) * sizeof(float));
  if (bits == nullptr) return;
  const uint32_t mask = V::bits(inside) & ((1u << rest) - 1u);
  for (int64_t byte = 0; 8 * byte < rest; ++byte) bits[i / 8 + byte] = static_cast<uint8_t>(mask >> (8 * byte));
}

template <class V, class Affine>
inline void norm_steps(const float* x, float* y, uint8_t* bits, int64_t n, const Affine& affine,
                       const NormSteps& steps) {
  if (!steps.quantize) norm_loop<V, false, false>(x, y, bits, n, affine, steps);
  else if (steps.clips) norm_loop<V, true, true>(x, y, bits, n, affine, steps);
  else norm_loop<V, true, false>(x, y, bits, n, affine, steps);
}

template <class V>
void norm_run(const float* x, float* y, uint8_t* bits, int64_t n, float factor, float shift, const NormSteps& steps) {
  norm_steps<V>(x, y, bits, n, OneAffine{factor, shift}, steps);
}

template <class V>
void norm_each(const float* x, float* y, uint8_t* bits, int64_t n, const float* factor, const float* shift,
               const NormSteps& steps) {
  norm_steps<V>(x, y, bits, n, EachAffine{factor, shift}, steps);
}

// Gradients of `norm_loop` that quantizes: dx is g where its bit was set; ds and dz (may be null) are what the element
// adds to those of the grid.
template <class V, bool Clips, class Affine>
inline void norm_learned_loop(const float* g, const float* x, float* dx, float* ds, float* dz, int64_t n,
                              const Affine& affine, const NormSteps& steps) {
  const auto low = V::set(steps.low), high = V::set(steps.high);
  const auto scale = V::set(steps.scale), zero_point = V::set(steps.zero_point);
  const auto first = V::set(steps.codes.low), last = V::set(steps.codes.high);
  const auto compute = [&](typename V::Float gradient, typename V::Float v, const auto& with, int64_t i) {
    const auto factor = with.template factor_at<V>(i), shift = with.template shift_at<V>(i);
    typename V::Mask inside;
    const auto clamped = norm_vector<V>(v, factor, shift, low, high, inside);
    LearnedTerms<V> terms = grid_terms<V, Clips>(gradient, clamped, scale, zero_point, first, last);
    terms.dx = V::keep(inside, terms.dx);
    return terms;
  };
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    const LearnedTerms<V> terms = compute(V::load(g + i), V::load(x + i), affine, i);
    V::store(dx + i, terms.dx);
    V::store(ds + i, terms.ds);
    if (dz != nullptr) V::store(dz + i, terms.dz);
  }
  if (i == n) return;
  const int64_t rest = n - i;
  float grads[V::width], values[V::width], affines[32] = {};
  copy_in<V>(grads, g + i, rest);
  copy_in<V>(values, x + i, rest);
  const LearnedTerms<V> terms = compute(V::load(grads), V::load(values), tail(affine, i, rest, affines), 0);
  const auto copy_out = [&](float* to, typename V::Float from) {
    V::store(values, from);
    std::memcpy(to + i, values, static_cast<size_t>(rest) * sizeof(float));
  };
  copy_out(dx, terms.dx);
  copy_out(ds, terms.ds);
  if (dz != nullptr) copy_out(dz, terms.dz);
}

template <class V>
void norm_learned_run(const float* g, const float* x, float* dx, float* ds, float* dz, int64_t n, float factor,
                      float shift, const NormSteps& steps) {
  const OneAffine affine{factor, shift};
  steps.clips ? norm_learned_loop<V, true>(g, x, dx, ds, dz, n, affine, steps)
              : norm_learned_loop<V, false>(g, x, dx, ds, dz, n, affine, steps);
}

template <class V>
void norm_learned_each(const float* g, const float* x, float* dx, float* ds, float* dz, int64_t n, const float* factor,
                       const float* shift, const NormSteps& steps) {
  const EachAffine affine{factor, shift};
  steps.clips ? norm_learned_loop<V, true>(g, x, dx, ds, dz, n, affine, steps)
              : norm_learned_loop<V, false>(g, x, dx, ds, dz, n, affine, steps);
}

// The compiler makes vectors of what follows; the order of the additions is written out, the same everywhere.

inline float lower(float a, float b) { return a < b ? a : b; }
inline float higher(float a, float b) { return a > b ? a : b; }

inline void moments_rows(const float* __restrict x, int64_t rows, int64_t channels, double* __restrict sum,
                         double* __restrict square, float* __restrict low, float* __restrict high) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, x += 2 * channels) {
    const float* const next = x + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double a = static_cast<double>(x[c]), b = static_cast<double>(next[c]);
      sum[c] += a + b;
      square[c] += a * a + b * b;
    }
    for (int64_t c = 0; c < channels; ++c) {
      low[c] = lower(low[c], lower(x[c], next[c]));
      high[c] = higher(high[c], higher(x[c], next[c]));
    }
  }
  if (r == rows) return;
  for (int64_t c = 0; c < channels; ++c) {
    const double a = static_cast<double>(x[c]);
    sum[c] += a;
    square[c] += a * a;
    low[c] = lower(low[c], x[c]);
    high[c] = higher(high[c], x[c]);
  }
}

constexpr int moment_lanes = 16;

inline double total(double* lanes) {
  for (int half = moment_lanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

inline void moments_run(const float* x, int64_t n, double* sum, double* square, float* low, float* high) {
  double sums[moment_lanes] = {}, squares[moment_lanes] = {};
  float lows[moment_lanes], highs[moment_lanes];
  for (int k = 0; k < moment_lanes; ++k) lows[k] = *low, highs[k] = *high;
  int64_t i = 0;
  for (; i + moment_lanes <= n; i += moment_lanes) {
    for (int k = 0; k < moment_lanes; ++k) {
      const double a = static_cast<double>(x[i + k]);
      sums[k] += a;
      squares[k] += a * a;
    }
    for (int k = 0; k < moment_lanes; ++k) {
      lows[k] = lower(lows[k], x[i + k]);
      highs[k] = higher(highs[k], x[i + k]);
    }
  }
  for (int k = 0; i + k < n; ++k) {
    const double a = static_cast<double>(x[i + k]);
    sums[k] += a;
    squares[k] += a * a;
    lows[k] = lower(lows[k], x[i + k]);
    highs[k] = higher(highs[k], x[i + k]);
  }
  *sum += total(sums);
  *square += total(squares);
  for (int k = 0; k < moment_lanes; ++k) *low = lower(*low, lows[k]), *high = higher(*high, highs[k]);
}

inline void products_rows(const float* __restrict g, const float* __restrict x, int64_t rows, int64_t channels,
                          double* __restrict sum, double* __restrict product) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, g += 2 * channels, x += 2 * channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const double a = static_cast<double>(g[c]), b = static_cast<double>(g[channels + c]);
      sum[c] += a + b;
      product[c] += a * static_cast<double>(x[c]) + b * static_cast<double>(x[channels + c]);
    }
  }
  if (r == rows) return;
  for (int64_t c = 0; c < channels; ++c) {
    const double a = static_cast<double>(g[c]);
    sum[c] += a;
    product[c] += a * static_cast<double>(x[c]);
  }
}

inline void products_run(const float* g, const float* x, int64_t n, double* sum, double* product) {
  double sums[moment_lanes] = {}, products[moment_lanes] = {};
  int64_t i = 0;
  for (; i + moment_lanes <= n; i += moment_lanes) {
    for (int k = 0; k < moment_lanes; ++k) {
      const double a = static_cast<double>(g[i + k]);
      sums[k] += a;
      products[k] += a * static_cast<double>(x[i + k]);
    }
  }
  for (int k = 0; i + k < n; ++k) {
    const double a = static_cast<double>(g[i + k]);
    sums[k] += a;
    products[k] += a * static_cast<double>(x[i + k]);
  }
  *sum += total(sums);
  *product += total(products);
}

inline void gradient_run(const float* g, const float* x, float* dx, int64_t n, float factor, float slope, float center,
                         float offset) {
  for (int64_t i = 0; i < n; ++i) dx[i] = g[i] * factor + ((x[i] - center) * slope + offset);
}

inline void gradient_each(const float* __restrict g, const float* __restrict x, float* __restrict dx, int64_t n,
                          const float* __restrict factor, const float* __restrict slope,
                          const float* __restrict center, const float* __restrict offset) {
  for (int64_t i = 0; i < n; ++i) dx[i] = g[i] * factor[i] + ((x[i] - center[i]) * slope[i] + offset[i]);
}

// Vectors by hand: the compiler would take single elements where y is x.
template <class V>
void add_run(const float* x, const float* other, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(y + i, V::add(V::load(x + i), V::load(other + i)));
  for (; i < n; ++i) y[i] = x[i] + other[i];
}

template <class V>
constexpr NormKernels norm_kernels() {
  return {&norm_run<V>,  &norm_each<V>,  &moments_rows, &moments_run,         &products_rows,       &products_run,
          &gradient_run, &gradient_each, &add_run<V>,   &norm_learned_run<V>, &norm_learned_each<V>};
}

template <class V>
constexpr Kernels all_kernels(const char* isa) {
  return {isa, &sum_run, &sum_each, &clip_error, typed_kernels<V, float>(), typed_kernels<V, uint16_t>(),
          norm_kernels<V>(), {&place_numbers, &keep_run<V>}, {&tanh_run<V>, &tanh_gradient_run<V>},
          {&oscillation_run<V>}};
}

}  // namespace
}  // namespace qat
