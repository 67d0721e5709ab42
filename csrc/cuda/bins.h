// Which of the 65536 bins a block keeps in shared memory: magnitudes in [2^-24, 2^8), both signs, 32 KiB.
#pragma once

#include "host_device.h"

namespace qat::cuda {

constexpr int first_exponent = 127 - 24, exponents = 32;
constexpr int private_bins = 2 * exponents * 128;

// -1: none.
QAT_HD int private_bin(uint32_t bin) {
  const int magnitude = static_cast<int>(bin & 0x7fffu) - first_exponent * 128;
  if (magnitude < 0 || magnitude >= exponents * 128) return -1;
  return magnitude + (bin >> 15 ? exponents * 128 : 0);
}

QAT_HD uint32_t public_bin(int slot) {
  const bool negative = slot >= exponents * 128;
  const int magnitude = slot - (negative ? exponents * 128 : 0) + first_exponent * 128;
  return static_cast<uint32_t>(magnitude) | (negative ? 0x8000u : 0u);
}

}  // namespace qat::cuda
