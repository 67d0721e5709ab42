// Tables of bytes by tbl, for the files of ARM.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace qat {
namespace {

// A look-up has 64 entries, and leaves what lies outside of them as it is (tbx).
struct NeonTable {
  explicit NeonTable(const uint8_t* table) {
    for (int part = 0; part < 4; ++part) parts[part] = vld1q_u8_x4(table + 64 * part);
  }
  uint8x16_t operator()(uint8x16_t codes) const {
    uint8x16_t found = vqtbl4q_u8(parts[0], codes);
    for (int part = 1; part < 4; ++part) {
      found = vqtbx4q_u8(found, parts[part], vsubq_u8(codes, vdupq_n_u8(static_cast<uint8_t>(64 * part))));
    }
    return found;
  }
  uint8x16x4_t parts[4];
};

inline void lookup_row(const NeonTable& table, const uint8_t* entries, const uint8_t* x, int64_t n, uint8_t* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) vst1q_u8(y + i, table(vld1q_u8(x + i)));
  for (; i < n; ++i) y[i] = entries[x[i]];
}

}  // namespace
}  // namespace qat
