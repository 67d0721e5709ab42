// What lets the arithmetic and the index logic of the kernels compile as plain C++ too, where tests run them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels/hd.h"

namespace qat::cuda {

// The divisor is a variable of the device, and the division is IEEE's whatever the compiler's options are.
QAT_HD float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Half to even.
QAT_HD float round_even(float x) {
#ifdef __CUDA_ARCH__
  return rintf(x);
#else
  return std::nearbyint(x);
#endif
}

// Correctly rounded whatever the compiler's options are.
QAT_HD float root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

QAT_HD double root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

QAT_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

QAT_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

QAT_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

QAT_HD bool is_nan(float x) { return x != x; }
QAT_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
QAT_HD float infinity() { return float_of(0x7f800000u); }

// Neither operand is nan.
QAT_HD float smaller(float a, float b) { return b < a ? b : a; }
QAT_HD float larger(float a, float b) { return a < b ? b : a; }

// bfloat16 values travel as their bit patterns.
QAT_HD float to_float(float x) { return x; }
QAT_HD float to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

QAT_HD void from_float(float x, float& to) { to = x; }
QAT_HD void from_float(float x, uint16_t& to) {
  const uint32_t bits = bits_of(x);
  to = is_nan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace qat::cuda
