// The loops of `TypedKernels`, over a vector type V that each instruction set's source file defines.
//
// Everything stands in an unnamed namespace, and no inline function of the standard library is called: a function that
// two files compile for different instruction sets must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace qat {
namespace {

// A run that is shorter than a vector goes through the vector code in a padded copy.
template <class V, class T>
inline void copy_in(T (&to)[V::width], const T* from, int64_t n) {
  std::memset(to, 0, sizeof(to));
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

template <class V>
inline void store_bits(uint8_t* bits, uint32_t mask) {
  for (int byte = 0; byte < V::width / 8; ++byte) bits[byte] = static_cast<uint8_t>(mask >> (8 * byte));
}

template <class V>
inline uint32_t load_bits(const uint8_t* bits) {
  uint32_t mask = 0;
  for (int byte = 0; byte < V::width / 8; ++byte) mask |= static_cast<uint32_t>(bits[byte]) << (8 * byte);
  return mask;
}

// The contract of docs/numerics.md: float32 division, half to even, nan has the code of zero, infinities saturate.
template <class V>
inline typename V::Float quantize_vector(typename V::Float x, typename V::Float scale, typename V::Float zero_point,
                                         typename V::Float low, typename V::Float high, typename V::Mask& inside) {
  const auto steps = V::round(V::div(x, scale));
  const auto number = V::ordered(steps);
  const auto code = V::add(V::keep(number, steps), zero_point);
  const auto clamped = V::min(V::max(code, low), high);
  inside = V::both(number, V::equal(code, clamped));
  return V::mul(V::sub(clamped, zero_point), scale);
}

template <class V, class T, class Grid>
inline void quantize_loop(const T* x, T* y, uint8_t* bits, int64_t n, const Grid& grid, Range range) {
  const auto low = V::set(range.low), high = V::set(range.high);
  typename V::Mask inside;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    V::store(y + i, quantize_vector<V>(V::load(x + i), grid.scale(i), grid.zero_point(i), low, high, inside));
    if (bits != nullptr) store_bits<V>(bits + i / 8, V::bits(inside));
  }
  if (i == n) return;
  const int64_t rest = n - i;
  T buffer[V::width];
  copy_in<V>(buffer, x + i, rest);
  const auto last = grid.last(i, rest);
  V::store(buffer, quantize_vector<V>(V::load(buffer), last.scale(0), last.zero_point(0), low, high, inside));
  std::memcpy(y + i, buffer, static_cast<size_t>(rest) * sizeof(T));
  if (bits == nullptr) return;
  const uint32_t mask = V::bits(inside) & ((1u << rest) - 1u);
  for (int64_t byte = 0; 8 * byte < rest; ++byte) bits[i / 8 + byte] = static_cast<uint8_t>(mask >> (8 * byte));
}

template <class V>
struct OneGrid {
  typename V::Float s, z;
  typename V::Float scale(int64_t) const { return s; }
  typename V::Float zero_point(int64_t) const { return z; }
  typename V::Float quantized(typename V::Float x) const { return x; }
  OneGrid last(int64_t, int64_t) const { return *this; }
};

template <class V>
struct PaddedGrid {
  float s[V::width], z[V::width];
  typename V::Float scale(int64_t) const { return V::load(s); }
  typename V::Float zero_point(int64_t) const { return V::load(z); }
  typename V::Float quantized(typename V::Float x) const { return x; }
};

template <class V>
struct EachGrid {
  const float *s, *z;
  typename V::Float scale(int64_t i) const { return V::load(s + i); }
  typename V::Float zero_point(int64_t i) const { return V::load(z + i); }
  typename V::Float quantized(typename V::Float x) const { return x; }
  PaddedGrid<V> last(int64_t i, int64_t rest) const {
    PaddedGrid<V> grid;
    copy_in<V>(grid.s, s + i, rest);
    copy_in<V>(grid.z, z + i, rest);
    return grid;
  }
};

template <class V, class T>
void quantize_run(const T* x, T* y, uint8_t* bits, int64_t n, float scale, float zero_point, Range range) {
  quantize_loop<V>(x, y, bits, n, OneGrid<V>{V::set(scale), V::set(zero_point)}, range);
}

template <class V, class T>
void quantize_each(const T* x, T* y, uint8_t* bits, int64_t n, const float* scale, const float* zero_point,
                   Range range) {
  quantize_loop<V>(x, y, bits, n, EachGrid<V>{scale, zero_point}, range);
}

template <class V, class T>
void mask_run(const T* grad, const uint8_t* bits, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store_masked(out + i, grad + i, load_bits<V>(bits + i / 8));
  for (; i < n; ++i) out[i] = (bits[i / 8] >> (i % 8)) & 1 ? grad[i] : T(0);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class V>
inline void widen(typename V::Float low, typename V::Float high, Extrema* extrema) {
  float lows[V::width], highs[V::width];
  V::store(lows, low);
  V::store(highs, high);
  for (int k = 0; k < V::width; ++k) {
    if (lows[k] < extrema->low) extrema->low = lows[k];
    if (highs[k] > extrema->high) extrema->high = highs[k];
  }
}

template <class V, class T>
void extrema_run(const T* x, int64_t n, Extrema* extrema) {
  const auto highest = V::set(bits_to_float(0x7f800000u)), lowest = V::set(bits_to_float(0xff800000u));
  auto low = highest, high = lowest;
  int64_t nonfinite = 0, i = 0;
  for (; i + V::width <= n; i += V::width) {
    const auto v = V::load(x + i);
    const auto finite = V::finite(v);
    low = V::min(low, V::select(finite, v, highest));
    high = V::max(high, V::select(finite, v, lowest));
    nonfinite += V::width - V::count(finite);
  }
  if (i < n) {  // zeros fill the copy, so what is no value is taken out
    T buffer[V::width];
    float lows[V::width], highs[V::width];
    copy_in<V>(buffer, x + i, n - i);
    const auto v = V::load(buffer);
    const auto finite = V::finite(v);
    V::store(lows, V::select(finite, v, highest));
    V::store(highs, V::select(finite, v, lowest));
    nonfinite += V::width - V::count(finite);
    for (int64_t k = 0; k < n - i; ++k) {
      if (lows[k] < extrema->low) extrema->low = lows[k];
      if (highs[k] > extrema->high) extrema->high = highs[k];
    }
  }
  widen<V>(low, high, extrema);
  extrema->nonfinite += nonfinite;
}

template <class V, class T>
void extrema_each(const T* x, int64_t n, float* low, float* high, int64_t* nonfinite) {
  int64_t count = 0, i = 0;
  for (; i + V::width <= n; i += V::width) {
    const auto v = V::load(x + i);
    const auto finite = V::finite(v);
    const auto l = V::load(low + i), h = V::load(high + i);
    V::store(low + i, V::select(finite, V::min(l, v), l));
    V::store(high + i, V::select(finite, V::max(h, v), h));
    count += V::width - V::count(finite);
  }
  for (; i < n; ++i) {
    Extrema one{low[i], high[i], 0};
    extrema_run<V>(x + i, 1, &one);
    low[i] = one.low;
    high[i] = one.high;
    count += one.nonfinite;
  }
  *nonfinite += count;
}

// ---- histograms

template <class V, class T>
int64_t bins_run(const T* x, int64_t n, int shift, uint32_t* bins, Extrema* extrema) {
  const auto highest = V::set(bits_to_float(0x7f800000u)), lowest = V::set(bits_to_float(0xff800000u));
  auto low = highest, high = lowest;
  int64_t nonfinite = 0, i = 0;
  uint32_t* to = bins;
  for (; i + V::width <= n; i += V::width) {
    const auto v = V::load(x + i);
    const auto finite = V::finite(v);
    low = V::min(low, V::select(finite, v, highest));
    high = V::max(high, V::select(finite, v, lowest));
    nonfinite += V::width - V::count(finite);
    to += V::pack_bins(v, shift, to);
  }
  widen<V>(low, high, extrema);
  extrema->nonfinite += nonfinite;
  if (i == n) return to - bins;
  extrema_run<V>(x + i, n - i, extrema);
  T buffer[V::width];
  copy_in<V>(buffer, x + i, n - i);  // filled up with zeros, which have no place in the list
  return to + V::pack_bins(V::load(buffer), shift, to) - bins;
}

// ---- weights

template <class V, class T>
void multiply_each(const T* x, const float* factor, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(out + i, V::mul(V::load(x + i), V::load(factor + i)));
  if (i == n) return;
  T buffer[V::width];
  float factors[V::width], products[V::width];
  copy_in<V>(buffer, x + i, n - i);
  copy_in<V>(factors, factor + i, n - i);
  V::store(products, V::mul(V::load(buffer), V::load(factors)));
  std::memcpy(out + i, products, static_cast<size_t>(n - i) * sizeof(float));
}

template <class V, class T>
void divide_each(const float* x, const float* factor, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(out + i, V::div(V::load(x + i), V::load(factor + i)));
  if (i == n) return;
  float buffer[V::width], factors[V::width];
  T quotients[V::width];
  copy_in<V>(buffer, x + i, n - i);
  copy_in<V>(factors, factor + i, n - i);
  V::store(quotients, V::div(V::load(buffer), V::load(factors)));
  std::memcpy(out + i, quotients, static_cast<size_t>(n - i) * sizeof(T));
}

template <class V, class T>
void weight_run(const T* x, T* y, uint8_t* bits, int64_t n, float factor, float scale, float zero_point, Range range) {
  const auto f = V::set(factor), s = V::set(scale), z = V::set(zero_point);
  const auto low = V::set(range.low), high = V::set(range.high);
  typename V::Mask inside;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    V::store(y + i, V::div(quantize_vector<V>(V::mul(V::load(x + i), f), s, z, low, high, inside), f));
    if (bits != nullptr) store_bits<V>(bits + i / 8, V::bits(inside));
  }
  if (i == n) return;
  const int64_t rest = n - i;
  T buffer[V::width];
  copy_in<V>(buffer, x + i, rest);
  V::store(buffer, V::div(quantize_vector<V>(V::mul(V::load(buffer), f), s, z, low, high, inside), f));
  std::memcpy(y + i, buffer, static_cast<size_t>(rest) * sizeof(T));
  if (bits == nullptr) return;
  const uint32_t mask = V::bits(inside) & ((1u << rest) - 1u);
  for (int64_t byte = 0; 8 * byte < rest; ++byte) bits[i / 8 + byte] = static_cast<uint8_t>(mask >> (8 * byte));
}

// The compiler makes vectors of these; the order of the additions is written out, so every instruction set has it.
inline double sum_run(const float* x, int64_t n) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int k = 0; k < lanes; ++k) sums[k] += static_cast<double>(x[i + k]);
  }
  for (int k = 0; i + k < n; ++k) sums[k] += static_cast<double>(x[i + k]);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

inline void sum_each(const float* x, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(x[i]);
}

inline double clip_error(const double* points, const double* jumps, int64_t n, double scale, double low, double high) {
  constexpr int lanes = 8;
  // added to a double below 2^51 and taken off again, it rounds half to even
  constexpr double to_integer = 0x1.8p52;
  const double inverse = 1.0 / scale, cube = scale * scale * scale / 12.0, third = 1.0 / 3.0;
  const auto primitive = [=](double t) {
    double k = t * inverse;
    k = k < low ? low : k;
    k = k > high ? high : k;
    k = (k + to_integer) - to_integer;
    const double r = t - k * scale;
    return r * r * r * third + k * cube;
  };
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int k = 0; k < lanes; ++k) sums[k] += primitive(points[i + k]) * jumps[i + k];
  }
  for (int k = 0; i + k < n; ++k) sums[k] += primitive(points[i + k]) * jumps[i + k];
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

}  // namespace
}  // namespace qat
