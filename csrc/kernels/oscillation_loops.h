// The loop of `OscillationKernels`, over a vector type V (training_loops.h).
#pragma once

#include "training_loops.h"

namespace qat {
namespace {

// So many elements that everything of theirs stays in the first-level cache; a multiple of every vector's width.
constexpr int64_t oscillation_block = 256;

// A part of a weight and of its state as float32, filled up with zeros to a whole vector.
struct OscillationBlock {
  float weight[oscillation_block], codes[oscillation_block], direction[oscillation_block];
  float average[oscillation_block], frequency[oscillation_block], frozen[oscillation_block], held[oscillation_block];
};

template <class V, class T>
inline void read_block(float (&to)[oscillation_block], const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  for (int64_t i = n; i % V::width != 0; ++i) to[i] = 0.0f;
}

template <class T>
inline void write_block(T* to, const float (&from)[oscillation_block], int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// The steps of qat/train/oscillation_step.py, in its order.
template <class V>
inline void oscillation_vector(OscillationBlock& b, int64_t i, typename V::Float factor, typename V::Float scale,
                               typename V::Float zero_point, Range range, const OscillationRule& rule) {
  const auto zero = V::set(0.0f), one = V::set(1.0f), momentum = V::set(rule.momentum);
  const auto low = V::set(range.low), high = V::set(range.high);
  const auto was_frozen = V::less(zero, V::load(b.frozen + i));
  auto held = V::load(b.held + i), weight = V::load(b.weight + i);
  if (rule.by_value) weight = V::select(was_frozen, held, weight);

  const auto steps = V::round(V::div(V::mul(weight, factor), scale));
  auto code = V::min(V::max(V::add(V::keep(V::ordered(steps), steps), zero_point), low), high);
  if (!rule.by_value) code = V::select(was_frozen, held, code);

  const auto moved = V::sub(code, V::load(b.codes + i));
  auto direction = V::load(b.direction + i);
  const auto change = V::select(V::less(zero, moved), one, V::keep(V::less(moved, zero), V::set(-1.0f)));
  const auto oscillates = V::keep(V::less(V::mul(change, direction), zero), one);
  auto frequency = V::load(b.frequency + i), average = V::load(b.average + i);
  frequency = V::add(frequency, V::mul(V::sub(oscillates, frequency), momentum));
  average = V::add(average, V::mul(V::sub(code, average), momentum));
  direction = V::select(V::equal(change, zero), direction, change);
  V::store(b.frequency + i, frequency);
  V::store(b.average + i, average);
  V::store(b.direction + i, direction);

  if (rule.freezes) {
    auto restless = V::both(V::less(V::set(rule.threshold), frequency), V::equal(V::load(b.frozen + i), zero));
    if (rule.spares_ends) restless = V::both(restless, V::both(V::less(low, code), V::less(code, high)));
    const auto before = V::sub(code, direction);
    const auto settled = V::min(V::max(V::round(average), V::min(code, before)), V::max(code, before));
    const auto step = V::div(scale, factor);
    const auto frozen = V::select(restless, one, V::load(b.frozen + i));
    const auto is_frozen = V::less(zero, frozen);
    held = V::select(restless, rule.by_value ? V::mul(V::sub(settled, zero_point), step) : settled, held);
    code = rule.by_value ? V::select(restless, settled, code) : V::select(is_frozen, held, code);
    weight = V::select(is_frozen, rule.by_value ? held : V::mul(V::sub(held, zero_point), step), weight);
    V::store(b.frozen + i, frozen);
    V::store(b.held + i, held);
  }
  V::store(b.codes + i, code);
  V::store(b.weight + i, weight);
}

template <class V>
void oscillation_run(float* weight, const OscillationState& state, int64_t n, float factor, float scale,
                     float zero_point, Range range, const OscillationRule& rule) {
  const auto f = V::set(factor), s = V::set(scale), z = V::set(zero_point);
  OscillationBlock b;
  for (int64_t first = 0; first < n; first += oscillation_block) {
    const int64_t count = n - first < oscillation_block ? n - first : oscillation_block;
    read_block<V>(b.weight, weight + first, count);
    read_block<V>(b.codes, state.codes + first, count);
    read_block<V>(b.direction, state.direction + first, count);
    read_block<V>(b.average, state.average + first, count);
    read_block<V>(b.frequency, state.frequency + first, count);
    read_block<V>(b.frozen, state.frozen + first, count);
    read_block<V>(b.held, state.held + first, count);
    for (int64_t i = 0; i < count; i += V::width) oscillation_vector<V>(b, i, f, s, z, range, rule);
    write_block(state.codes + first, b.codes, count);
    write_block(state.direction + first, b.direction, count);
    write_block(state.average + first, b.average, count);
    write_block(state.frequency + first, b.frequency, count);
    if (rule.freezes) {
      write_block(state.frozen + first, b.frozen, count);
      write_block(state.held + first, b.held, count);
    }
    if (rule.freezes || rule.by_value) write_block(weight + first, b.weight, count);
  }
}

}  // namespace
}  // namespace qat
