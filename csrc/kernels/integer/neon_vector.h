// The vector type of 128-bit ARM, for the files of its instruction sets. Activations are signed bytes (`signed_left`).
#pragma once

#include <arm_neon.h>

#include <cstddef>

#include "depthwise_loops.h"
#include "neon_lookup.h"
#include "tile_loops.h"

namespace qat {
namespace {

struct Vector {
  static constexpr int width = 4;
  static constexpr int group = 4;
  // 6 x 4 accumulators, six activations, and weights one after the other
  template <int Units>
  static constexpr int rows = 6;

  using Int = int32x4_t;
  using Float = float32x4_t;
  using Flip = int8x16_t;
  using Left = int8x16_t;
  using Right = int8x16_t;

  struct Bytes {
    explicit Bytes(const ByteCodes& c)
        : zero(vdupq_n_s16(c.zero)),
          low(vdupq_n_u8(c.low)),
          high(vdupq_n_u8(c.high)),
          flip(vdupq_n_u8(c.flip)),
          plain(c.plain()) {}
    int16x8_t zero;
    uint8x16_t low, high, flip;
    bool plain;
  };

  static Int load(const int32_t* from) { return vld1q_s32(from); }
  static void store(int32_t* to, Int a) { vst1q_s32(to, a); }
  static Int set(int32_t a) { return vdupq_n_s32(a); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }

  static Float load(const float* from) { return vld1q_f32(from); }
  static Float set(float a) { return vdupq_n_f32(a); }
  static Float to_float(Int a) { return vcvtq_f32_s32(a); }
  static Int to_int(Float a) { return vcvtnq_s32_f32(a); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float min(Float a, Float b) { return vminnmq_f32(a, b); }
  static Float max(Float a, Float b) { return vmaxnmq_f32(a, b); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float round(Float a) { return vrndnq_f32(a); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

  static Flip flip(uint8_t byte) { return vreinterpretq_s8_u8(vdupq_n_u8(byte)); }
  static Left left(const uint8_t* four, Flip flip) {
    int32_t word;
    __builtin_memcpy(&word, four, 4);
    return veorq_s8(vreinterpretq_s8_s32(vdupq_n_s32(word)), flip);
  }
  static Right right(const int8_t* from) { return vld1q_s8(from); }
  static Left bytes_at(const uint8_t* from, Flip flip) { return veorq_s8(vreinterpretq_s8_u8(vld1q_u8(from)), flip); }

#ifdef __ARM_FEATURE_DOTPROD
  static Int dot(Int acc, Left a, Right b) { return vdotq_s32(acc, a, b); }
#else
  // no sum of two products is made in 16 bits, where that of -128 * -128 with itself overflows
  static Int dot(Int acc, Left a, Right b) {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vaddq_s32(acc, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, b))));
  }
#endif

  template <int Rows>
  static void interleave(const uint8_t* const* from, int64_t offset, Flip flip, Left to[4]) {
    const int8x16_t a = bytes_at(from[0] + offset, flip);
    const int8x16_t b = bytes_at(from[1] + offset, flip);
    const int8x16_t c = bytes_at(from[2] + offset, flip);
    const int8x16_t d = Rows == 4 ? bytes_at(from[3] + offset, flip) : c;
    const int16x8_t ab_low = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab_high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
    const int16x8_t cd_low = vreinterpretq_s16_s8(vzip1q_s8(c, d)), cd_high = vreinterpretq_s16_s8(vzip2q_s8(c, d));
    to[0] = vreinterpretq_s8_s16(vzip1q_s16(ab_low, cd_low));
    to[1] = vreinterpretq_s8_s16(vzip2q_s16(ab_low, cd_low));
    to[2] = vreinterpretq_s8_s16(vzip1q_s16(ab_high, cd_high));
    to[3] = vreinterpretq_s8_s16(vzip2q_s16(ab_high, cd_high));
  }

  static Int codes(const uint8_t* from, bool is_signed) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
    const int16x4_t with_sign = vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes)));
    const uint16x4_t without = vget_low_u16(vmovl_u8(bytes));
    return is_signed ? vmovl_s16(with_sign) : vreinterpretq_s32_u32(vmovl_u16(without));
  }

  static uint8x16_t pack(const Int* c, const Bytes& bytes) {
    const int16x8_t low = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(c[0]), c[1]), bytes.zero);
    const int16x8_t high = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(c[2]), c[3]), bytes.zero);
    const uint8x16_t packed = vqmovun_high_s16(vqmovun_s16(low), high);
    if (bytes.plain) return packed;
    return veorq_u8(vminq_u8(vmaxq_u8(packed, bytes.low), bytes.high), bytes.flip);
  }

  static void store_bytes(uint8_t* to, uint8x16_t bytes, int32_t count) {
    if (count >= 16) {
      vst1q_u8(to, bytes);
    } else {
      uint8_t buffer[16];
      vst1q_u8(buffer, bytes);
      __builtin_memcpy(to, buffer, static_cast<size_t>(count));
    }
  }

  template <int Units>
  static void store_columns(uint8_t* to, const Int* c, const Bytes& bytes, int32_t columns) {
    static_assert(Units == 1, "32 registers hold no wider tile of enough rows");
    store_bytes(to, pack(c, bytes), columns);
  }

  static void store_interleaved(uint8_t* to, const Int c[4], const Bytes& bytes, int32_t channels) {
    store_bytes(to, pack(c, bytes), channels);
  }
};

void depthwise(const DepthwiseBlock& block) { depthwise_rows<Vector>(block); }

void depthwise_line(const DepthwiseLine& line) { depthwise_lines<Vector>(line); }

void lookup(const uint8_t* table, uint8_t* y, int64_t rows, int64_t columns, int64_t stride) {
  const NeonTable parts(table);
  for (int64_t r = 0; r < rows; ++r) lookup_row(parts, table, y + r * stride, columns, y + r * stride);
}

}  // namespace
}  // namespace qat
