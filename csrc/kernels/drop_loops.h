// The loops of `DropKernels` and of `tanh_run`, over a vector type V; what holds for training_loops.h holds here.
#pragma once

#include "drop_hash.h"
#include "tanh_terms.h"
#include "training_loops.h"

namespace qat {
namespace {

// The compiler makes vectors of it.
inline void place_numbers(DropKey key, int64_t first, float* out, int64_t n) {
  const auto start = static_cast<uint32_t>(first);
  for (int64_t i = 0; i < n; ++i) out[i] = place_number(key, start + static_cast<uint32_t>(i));
}

template <class V>
void keep_run(const float* numbers, float threshold, const float* kept, const uint8_t* kept_bits, float* y,
              uint8_t* bits, int64_t n) {
  const auto below = V::set(threshold);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    const auto keeps = V::less(V::load(numbers + i), below);
    V::store(y + i, V::select(keeps, V::load(kept + i), V::load(y + i)));
    if (bits == nullptr) continue;
    const uint32_t mask = V::bits(keeps);
    store_bits<V>(bits + i / 8, (load_bits<V>(bits + i / 8) & ~mask) | (load_bits<V>(kept_bits + i / 8) & mask));
  }
  for (; i < n; ++i) {
    if (!(numbers[i] < threshold)) continue;
    y[i] = kept[i];
    if (bits == nullptr) continue;
    const auto bit = static_cast<uint8_t>(1u << (i % 8));
    bits[i / 8] = static_cast<uint8_t>((bits[i / 8] & ~bit) | (kept_bits[i / 8] & bit));
  }
}

template <class V>
inline typename V::Float tanh_vector(typename V::Float x) {
  const auto bound = V::set(tanh_bound);
  const auto held = V::min(V::max(x, V::sub(V::set(0.0f), bound)), bound);
  const auto square = V::mul(held, held);
  auto above = V::set(tanh_above(tanh_degree)), below = V::set(tanh_below(tanh_degree));
  for (int k = tanh_degree - 1; k >= 0; --k) {
    above = V::add(V::mul(above, square), V::set(tanh_above(k)));
    below = V::add(V::mul(below, square), V::set(tanh_below(k)));
  }
  const auto one = V::set(1.0f), value = V::div(V::mul(held, above), below);
  const auto clamped = V::min(V::max(value, V::sub(V::set(0.0f), one)), one);
  return V::select(V::ordered(x), clamped, x);
}

template <class V>
void tanh_run(const float* x, float* y, int64_t n, float ratio) {
  const auto r = V::set(ratio);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(y + i, V::mul(tanh_vector<V>(V::load(x + i)), r));
  if (i == n) return;
  float buffer[V::width];
  copy_in<V>(buffer, x + i, n - i);
  V::store(buffer, V::mul(tanh_vector<V>(V::load(buffer)), r));
  std::memcpy(y + i, buffer, static_cast<size_t>(n - i) * sizeof(float));
}

template <class V>
void tanh_gradient_run(const float* grad, const float* x, float* dx, int64_t n, float ratio) {
  const auto r = V::set(ratio), one = V::set(1.0f);
  const auto compute = [&](typename V::Float g, typename V::Float v) {
    const auto t = tanh_vector<V>(v);
    return V::mul(V::mul(g, r), V::sub(one, V::mul(t, t)));
  };
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(dx + i, compute(V::load(grad + i), V::load(x + i)));
  if (i == n) return;
  float grads[V::width], values[V::width];
  copy_in<V>(grads, grad + i, n - i);
  copy_in<V>(values, x + i, n - i);
  V::store(grads, compute(V::load(grads), V::load(values)));
  std::memcpy(dx + i, grads, static_cast<size_t>(n - i) * sizeof(float));
}

}  // namespace
}  // namespace qat
