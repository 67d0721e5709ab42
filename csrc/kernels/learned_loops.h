// The loops of `TypedKernels` for learned grids, over a vector type V, and the table; what holds for training_loops.h holds
// here.
#pragma once

#include "training_loops.h"

namespace qat {
namespace {

template <class V>
struct LearnedTerms {
  typename V::Float dx, ds, dz;
};

// Inside the range y = (round(x / s)) s: 1 for x, round(x / s) - x / s for s, nothing for z. Outside y = (bound - z) s:
// nothing for x, bound - z for s, -s for z. A nan has the code of zero whatever the grid: nothing at all.
template <class V>
inline LearnedTerms<V> learned_terms(typename V::Float g, typename V::Float x, typename V::Float scale,
                                     typename V::Float zero_point, typename V::Float low, typename V::Float high) {
  const auto quotient = V::div(x, scale), steps = V::round(quotient);
  const auto number = V::ordered(steps);
  const auto code = V::add(V::keep(number, steps), zero_point), clamped = V::min(V::max(code, low), high);
  const auto inside = V::both(number, V::equal(code, clamped));
  const auto reached = V::sub(clamped, zero_point);
  const auto none = V::set(0.0f);
  return {V::keep(inside, g),
          V::keep(number, V::mul(g, V::select(inside, V::sub(reached, quotient), reached))),
          V::keep(number, V::select(inside, none, V::mul(g, V::sub(none, scale))))};
}

// Whether a value lies between the ends of the grid, or on one.
template <class V>
inline typename V::Mask between_ends(typename V::Float x, typename V::Float scale, typename V::Float zero_point,
                                     typename V::Float low, typename V::Float high) {
  const auto first = V::mul(V::sub(low, zero_point), scale), last = V::mul(V::sub(high, zero_point), scale);
  return V::equal(x, V::min(V::max(x, first), last));
}

// Where the clip is learned, the rounding error is none of its gradient, and what is less than half a step beyond an end
// is clipped too: between the ends 1 for x, beyond them bound - z for s; nothing for z, which stays.
template <class V>
inline LearnedTerms<V> clip_terms(typename V::Float g, typename V::Float x, typename V::Float scale,
                                  typename V::Float zero_point, typename V::Float low, typename V::Float high) {
  const auto inside = between_ends<V>(x, scale, zero_point, low, high);
  const auto none = V::set(0.0f);
  // a grid has zero on it, so what is clipped at its lower end is negative
  const auto reached = V::sub(V::select(V::less(x, none), low, high), zero_point);
  return {V::keep(inside, g), V::select(inside, none, V::keep(V::ordered(x), V::mul(g, reached))), none};
}

template <class V, bool Clips>
inline LearnedTerms<V> grid_terms(typename V::Float g, typename V::Float x, typename V::Float scale,
                                  typename V::Float zero_point, typename V::Float low, typename V::Float high) {
  if (Clips) return clip_terms<V>(g, x, scale, zero_point, low, high);
  return learned_terms<V>(g, x, scale, zero_point, low, high);
}

// Of a weight, which is quantized times a factor.
template <class V>
struct WeightGrid : OneGrid<V> {
  typename V::Float factor;
  typename V::Float quantized(typename V::Float w) const { return V::mul(w, factor); }
  WeightGrid last(int64_t, int64_t) const { return *this; }
};

template <class V, bool Clips, class T, class Grid>
inline void learned_vector(const T* grad, const T* x, T* dx, float* ds, float* dz, const Grid& grid, int64_t i,
                           Range range) {
  const auto terms = grid_terms<V, Clips>(V::load(grad), grid.quantized(V::load(x)), grid.scale(i), grid.zero_point(i),
                                          V::set(range.low), V::set(range.high));
  V::store(dx, terms.dx);
  V::store(ds, terms.ds);
  if (dz != nullptr) V::store(dz, terms.dz);
}

template <class V, bool Clips, class T, class Grid>
inline void learned_loop(const T* grad, const T* x, T* dx, float* ds, float* dz, int64_t n, const Grid& grid,
                         Range range) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    learned_vector<V, Clips>(grad + i, x + i, dx + i, ds + i, dz == nullptr ? dz : dz + i, grid, i, range);
  }
  if (i == n) return;
  const int64_t rest = n - i;
  T grads[V::width], values[V::width];
  float scales[V::width], zeros[V::width];
  copy_in<V>(grads, grad + i, rest);
  copy_in<V>(values, x + i, rest);
  learned_vector<V, Clips>(grads, values, grads, scales, zeros, grid.last(i, rest), 0, range);
  std::memcpy(dx + i, grads, static_cast<size_t>(rest) * sizeof(T));
  std::memcpy(ds + i, scales, static_cast<size_t>(rest) * sizeof(float));
  if (dz != nullptr) std::memcpy(dz + i, zeros, static_cast<size_t>(rest) * sizeof(float));
}

template <class V, class T>
void weight_learned_run(const T* grad, const T* w, T* dw, float* ds, float* dz, int64_t n, float factor, float scale,
                        float zero_point, Range range) {
  const WeightGrid<V> grid{{V::set(scale), V::set(zero_point)}, V::set(factor)};
  learned_loop<V, false>(grad, w, dw, ds, dz, n, grid, range);
}

template <class V, class T>
void learned_run(const T* grad, const T* x, T* dx, float* ds, float* dz, int64_t n, float scale, float zero_point,
                 Range range, bool clips) {
  const OneGrid<V> grid{V::set(scale), V::set(zero_point)};
  clips ? learned_loop<V, true>(grad, x, dx, ds, dz, n, grid, range)
        : learned_loop<V, false>(grad, x, dx, ds, dz, n, grid, range);
}

template <class V, class T>
void learned_each(const T* grad, const T* x, T* dx, float* ds, float* dz, int64_t n, const float* scale,
                  const float* zero_point, Range range, bool clips) {
  const EachGrid<V> grid{scale, zero_point};
  clips ? learned_loop<V, true>(grad, x, dx, ds, dz, n, grid, range)
        : learned_loop<V, false>(grad, x, dx, ds, dz, n, grid, range);
}

template <class V, class T>
constexpr TypedKernels<T> typed_kernels() {
  return {&quantize_run<V, T>,  &quantize_each<V, T>, &mask_run<V, T>,    &extrema_run<V, T>, &extrema_each<V, T>,
          &bins_run<V, T>,      &multiply_each<V, T>, &divide_each<V, T>, &weight_run<V, T>,  &learned_run<V, T>,
          &learned_each<V, T>,  &weight_learned_run<V, T>};
}

}  // namespace
}  // namespace qat
