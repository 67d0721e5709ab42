// Which bins of a histogram a block keeps in shared memory: 8192, 32 KiB, of the magnitudes that are likely.
#pragma once

#include "host_device.h"

namespace qat::cuda {

constexpr int private_bins = 8192;

// Bins are the upper 9 + mantissa_bits bits of the float32 pattern: sign, exponent, leading bits of the mantissa.
struct Bins {
  int mantissa_bits, first_exponent, half;  // `half`: private bins of a sign

  explicit QAT_HD Bins(int mantissa_bits_) : mantissa_bits(mantissa_bits_) {
    int exponents = (private_bins / 2) >> mantissa_bits;
    if (exponents > 256) exponents = 256;
    // three quarters of them below one; with 7 bits of mantissa [2^-24, 2^8)
    first_exponent = 127 - exponents / 4 * 3;
    if (first_exponent < 0) first_exponent = 0;
    half = exponents << mantissa_bits;
  }

  QAT_HD int64_t count() const { return int64_t{1} << (9 + mantissa_bits); }
  QAT_HD uint32_t of(float x) const { return bits_of(x) >> (23 - mantissa_bits); }

  // -1: none.
  QAT_HD int slot(uint32_t bin) const {
    const uint32_t sign = 1u << (8 + mantissa_bits);
    const int magnitude = static_cast<int>(bin & (sign - 1u)) - (first_exponent << mantissa_bits);
    if (magnitude < 0 || magnitude >= half) return -1;
    return magnitude + (bin & sign ? half : 0);
  }

  QAT_HD uint32_t bin(int slot) const {
    const bool negative = slot >= half;
    const int magnitude = slot - (negative ? half : 0) + (first_exponent << mantissa_bits);
    return static_cast<uint32_t>(magnitude) | (negative ? 1u << (8 + mantissa_bits) : 0u);
  }
};

}  // namespace qat::cuda
