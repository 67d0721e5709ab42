// The loops in plain C++, written so that the compiler makes vectors of them, for the file of one instruction set to
// include. All of it is unnamed, and nothing of the standard library is used: see docs/native.md.
#pragma once

#include "loops.h"

// No iteration depends on another one: y may be an operand, element by element.
#if defined(__clang__)
#define QAT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define QAT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace qat {
namespace {

constexpr int64_t tile = 256;

#if defined(__AVX512BW__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Nan becomes low.
inline float clamp(float v, float low, float high) {
  v = v > low ? v : low;
  return v < high ? v : high;
}

// Half to even, of |v| <= 2^22: the addition drops the fraction.
inline int32_t round_to_int(float v) {
  v += 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits - 0x4b400000;
}

// Whatever depends on the type of codes: calls function(value of that type).
template <class Function>
inline __attribute__((always_inline)) void with_type(Type type, Function function) {
  switch (type) {
    case Type::u8: return function(uint8_t{});
    case Type::s8: return function(int8_t{});
    case Type::u16: return function(uint16_t{});
    default: return function(int16_t{});
  }
}

// For results, whose bits are the same with and without a sign.
template <class Function>
inline __attribute__((always_inline)) void with_width(Type type, Function function) {
  if (type == Type::u8 || type == Type::s8) return function(uint8_t{});
  return function(uint16_t{});
}

void dequantize(Type type, const Grid& grid, const void* x, int64_t n, float* y) {
  const int32_t zero_point = grid.zero_point;
  const float scale = grid.scale;
  with_type(type, [=](auto code) {
    const auto* from = static_cast<const decltype(code)*>(x);
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) y[i] = scale * static_cast<float>(from[i] - zero_point);
  });
}

void quantize(Type type, const Grid& grid, const float* x, int64_t n, void* y) {
  const int32_t zero_point = grid.zero_point;
  const float scale = grid.scale;
  const float low = static_cast<float>(grid.qmin - zero_point), high = static_cast<float>(grid.qmax - zero_point);
  with_width(type, [=](auto code) {
    using Code = decltype(code);
    auto* to = static_cast<Code*>(y);
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<Code>(round_to_int(clamp(x[i] / scale, low, high)) + zero_point);
    }
  });
}

// y = compute(a, b) for all elements, the steps known to the compiler.
template <class A, class B, class Compute>
inline __attribute__((always_inline)) void for_rows(const BinaryRows& r, Compute compute) {
  for (int64_t row = 0; row < r.rows; ++row) {
    const A* a = static_cast<const A*>(r.a) + row * r.a_stride;
    const B* b = static_cast<const B*>(r.b) + row * r.b_stride;
    auto* y = static_cast<uint8_t*>(r.y) + row * r.y_stride;
    const int64_t n = r.columns;
    if (r.a_step == 0) {
      const A one = *a;
      QAT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) y[i] = compute(one, b[i]);
    } else if (r.b_step == 0) {
      const B one = *b;
      QAT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) y[i] = compute(a[i], one);
    } else {
      QAT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) y[i] = compute(a[i], b[i]);
    }
  }
}

template <class Compute>
inline __attribute__((always_inline)) void binary8(const Type types[3], const BinaryRows& rows, Compute compute) {
  const bool a_signed = types[0] == Type::s8, b_signed = types[1] == Type::s8;
  if (a_signed && b_signed) return for_rows<int8_t, int8_t>(rows, compute);
  if (a_signed) return for_rows<int8_t, uint8_t>(rows, compute);
  if (b_signed) return for_rows<uint8_t, int8_t>(rows, compute);
  return for_rows<uint8_t, uint8_t>(rows, compute);
}

void add(const Type types[3], const Grid grids[3], const BinaryRows& rows) {
  const Grid &a = grids[0], &b = grids[1], &y = grids[2];
  const float ratio_a = a.scale / y.scale, ratio_b = b.scale / y.scale;
  const float zero_b = ratio_b * static_cast<float>(b.zero_point);
  const float fixed =
      static_cast<float>(y.zero_point) - __builtin_fmaf(ratio_a, static_cast<float>(a.zero_point), zero_b);
  const float low = static_cast<float>(y.qmin), high = static_cast<float>(y.qmax);
  binary8(types, rows, [=](int32_t left, int32_t right) {
    const float partial = __builtin_fmaf(static_cast<float>(right), ratio_b, fixed);
    const float sum = __builtin_fmaf(static_cast<float>(left), ratio_a, partial);
    return static_cast<uint8_t>(round_to_int(clamp(sum, low, high)));
  });
}

void mul(const Type types[3], const Grid grids[3], const BinaryRows& rows) {
  const Grid &a = grids[0], &b = grids[1], &y = grids[2];
  const float ratio = a.scale * b.scale / y.scale, zero_point = static_cast<float>(y.zero_point);
  const int32_t zero_a = a.zero_point, zero_b = b.zero_point;
  const float low = static_cast<float>(y.qmin), high = static_cast<float>(y.qmax);
  binary8(types, rows, [=](int32_t left, int32_t right) {
    const float product = static_cast<float>((left - zero_a) * (right - zero_b));
    return static_cast<uint8_t>(round_to_int(clamp(product * ratio + zero_point, low, high)));
  });
}

void combine(Arithmetic op, const float* b, int64_t n, float* a) {
  const auto each = [=](auto compute) {
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) a[i] = compute(a[i], b[i]);
  };
  switch (op) {
    case Arithmetic::add: return each([](float p, float q) { return p + q; });
    case Arithmetic::sub: return each([](float p, float q) { return p - q; });
    case Arithmetic::mul: return each([](float p, float q) { return p * q; });
    case Arithmetic::div: return each([](float p, float q) { return p / q; });
  }
}

void prelu(const float* slope, int32_t step, int64_t n, float* x) {
  if (step == 0) {
    const float one = *slope;
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] > 0.0f ? x[i] : x[i] * one;
  } else {
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] > 0.0f ? x[i] : x[i] * slope[i];
  }
}

// `Bytes` of codes from `start` on.
template <int Bytes, class Code>
inline __attribute__((always_inline)) void maximum_block(const void* const* taps, int64_t count, int64_t start,
                                                         Code* y) {
  typedef Code Vector __attribute__((vector_size(Bytes)));
  Vector most;
  __builtin_memcpy(&most, static_cast<const Code*>(taps[0]) + start, sizeof most);
  for (int64_t t = 1; t < count; ++t) {
    Vector tap;
    __builtin_memcpy(&tap, static_cast<const Code*>(taps[t]) + start, sizeof tap);
    most = tap > most ? tap : most;
  }
  __builtin_memcpy(y + start, &most, sizeof most);
}

// All blocks; the last one overlaps the one before it, which does no harm to a maximum. Returns false if there is none.
template <int Bytes, class Code>
inline __attribute__((always_inline)) bool maximum_blocks(const void* const* taps, int64_t count, int64_t n, Code* y) {
  constexpr int64_t size = Bytes / static_cast<int64_t>(sizeof(Code));
  if (n < size) return false;
  for (int64_t start = 0; start + size <= n; start += size) maximum_block<Bytes>(taps, count, start, y);
  if (n % size != 0) maximum_block<Bytes>(taps, count, n - size, y);
  return true;
}

void maximum(Type type, const void* const* taps, int64_t count, int64_t n, void* y) {
  with_type(type, [=](auto code) {
    using Code = decltype(code);
    auto* to = static_cast<Code*>(y);
    if (maximum_blocks<vector_bytes>(taps, count, n, to) || maximum_blocks<16>(taps, count, n, to)) return;
    for (int64_t i = 0; i < n; ++i) {
      Code most = static_cast<const Code*>(taps[0])[i];
      for (int64_t t = 1; t < count; ++t) {
        const Code tap = static_cast<const Code*>(taps[t])[i];
        most = tap > most ? tap : most;
      }
      to[i] = most;
    }
  });
}

void sum(Type type, const void* x, int64_t rows, int64_t stride, int64_t n, int32_t* acc) {
  with_type(type, [=](auto code) {
    const auto* from = static_cast<const decltype(code)*>(x);
    for (int64_t row = 0; row < rows; ++row, from += stride) {
      QAT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) acc[i] += from[i];
    }
  });
}

void sum_real(Type type, const Grid& grid, const void* x, int64_t n, float* acc) {
  const int32_t zero_point = grid.zero_point;
  const float scale = grid.scale;
  with_type(type, [=](auto code) {
    const auto* from = static_cast<const decltype(code)*>(x);
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) acc[i] += scale * static_cast<float>(from[i] - zero_point);
  });
}

void average(Type type, const Grid& grid, const float* sum, float count, int64_t n, void* y) {
  const float scale = grid.scale, zero_point = static_cast<float>(grid.zero_point);
  const float low = static_cast<float>(grid.qmin), high = static_cast<float>(grid.qmax);
  with_width(type, [=](auto code) {
    using Code = decltype(code);
    auto* to = static_cast<Code*>(y);
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<Code>(round_to_int(clamp(sum[i] / count / scale + zero_point, low, high)));
    }
  });
}

void blend(Type type, const Grid& grid, const void* const taps[4], const float weights[4], int64_t n, float* y) {
  const int32_t zero_point = grid.zero_point;
  const float scale = grid.scale;
  const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  with_type(type, [=](auto code) {
    using Code = decltype(code);
    const auto *t0 = static_cast<const Code*>(taps[0]), *t1 = static_cast<const Code*>(taps[1]);
    const auto *t2 = static_cast<const Code*>(taps[2]), *t3 = static_cast<const Code*>(taps[3]);
    const auto real = [=](Code c) { return scale * static_cast<float>(c - zero_point); };
    QAT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      y[i] = w0 * real(t0[i]) + w1 * real(t1[i]) + w2 * real(t2[i]) + w3 * real(t3[i]);
    }
  });
}

void shares(const float exponentials[256], float sum, uint8_t share[256]) {
  QAT_INDEPENDENT
  for (int32_t i = 0; i < 256; ++i) {
    const float v = exponentials[i] * 256.0f / sum;
    // an infinite product becomes the code of 0, as where the runtime converts it to an integer; compared as bits,
    // because the compiler makes no vectors of the comparison of floats
    int32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    bits = bits < 0x7f800000 ? bits : 0;
    float finite;
    __builtin_memcpy(&finite, &bits, sizeof bits);
    share[i] = static_cast<uint8_t>(round_to_int(clamp(finite, 0.0f, 255.0f)));
  }
}

// Mean and sum of squared deviations value by value (Welford 1962): rows shorter than a vector.
void moments_of_few(const float* x, int64_t n, float* mean, float* squares) {
  float m = 0.0f, s = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float deviation = x[i] - m;
    m = m + deviation / static_cast<float>(i + 1);
    s = s + deviation * (x[i] - m);
  }
  *mean = m;
  *squares = s;
}

template <class Code>
inline __attribute__((always_inline)) void moments(const Code* x, const Grid& grid, int64_t n, float* mean,
                                                   float* squares) {
  constexpr int lanes = 8, many = 32;
  const int32_t zero_point = grid.zero_point;
  const float scale = grid.scale;
  const auto real = [=](Code c) { return scale * static_cast<float>(c - zero_point); };
  // float32 values of few exponents: the double sum is exact in any order
  double parts[many] = {};
  int64_t i = 0;
  for (; i + many <= n; i += many) {
    for (int k = 0; k < many; ++k) parts[k] += static_cast<double>(real(x[i + k]));
  }
  double total = 0.0;
  for (double part : parts) total += part;
  for (; i < n; ++i) total += static_cast<double>(real(x[i]));
  const float m = static_cast<float>(total / static_cast<double>(n));

  float sums[lanes] = {};
  const int64_t whole = n / lanes * lanes;
  for (i = 0; i < whole; i += lanes) {
    for (int k = 0; k < lanes; ++k) {
      const float deviation = real(x[i + k]) - m;
      sums[k] = __builtin_fmaf(deviation, deviation, sums[k]);
    }
  }
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] = sums[k] + sums[half + k];
  }
  float s = sums[0];
  const int64_t fours = whole + (n - whole) / 4 * 4;
  for (; i < fours; ++i) {
    const float deviation = real(x[i]) - m;
    s = s + deviation * deviation;
  }
  for (; i < n; ++i) {
    const float deviation = real(x[i]) - m;
    s = __builtin_fmaf(deviation, deviation, s);
  }
  *mean = m;
  *squares = s;
}

void layer_norm(const Type types[2], const Grid grids[2], const void* x, int64_t n, const float* weight,
                const float* bias, float epsilon, void* y) {
  float mean = 0.0f, squares = 0.0f;
  if (n < 8) {
    float row[8];
    dequantize(types[0], grids[0], x, n, row);
    moments_of_few(row, n, &mean, &squares);
  } else {
    with_type(types[0], [&](auto code) {
      moments(static_cast<const decltype(code)*>(x), grids[0], n, &mean, &squares);
    });
  }
  const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon);
  const int64_t x_width = types[0] == Type::u8 || types[0] == Type::s8 ? 1 : 2;
  const int64_t y_width = types[1] == Type::u8 || types[1] == Type::s8 ? 1 : 2;
  for (int64_t start = 0; start < n; start += tile) {
    const int64_t size = n - start < tile ? n - start : tile;
    float real[tile];
    dequantize(types[0], grids[0], static_cast<const char*>(x) + start * x_width, size, real);
    const float* w = weight == nullptr ? nullptr : weight + start;
    const float* b = bias == nullptr ? nullptr : bias + start;
    if (w != nullptr && b != nullptr) {
      for (int64_t i = 0; i < size; ++i) real[i] = __builtin_fmaf((real[i] - mean) * inverse, w[i], b[i]);
    } else if (w != nullptr) {
      for (int64_t i = 0; i < size; ++i) real[i] = (real[i] - mean) * inverse * w[i];
    } else if (b != nullptr) {
      for (int64_t i = 0; i < size; ++i) real[i] = (real[i] - mean) * inverse + b[i];
    } else {
      for (int64_t i = 0; i < size; ++i) real[i] = (real[i] - mean) * inverse;
    }
    quantize(types[1], grids[1], real, size, static_cast<char*>(y) + start * y_width);
  }
}

constexpr Loops make_loops(void (*lookup)(const uint8_t*, const uint8_t*, int64_t, uint8_t*)) {
  return {dequantize, quantize, add,      mul,     combine, prelu,  lookup,
          maximum,    sum,      sum_real, average, blend,   shares, layer_norm};
}

// One load a code.
void lookup_plain(const uint8_t* table, const uint8_t* x, int64_t n, uint8_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = table[x[i]];
}

}  // namespace
}  // namespace qat
