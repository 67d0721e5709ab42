// ARMv8-A, of which NEON is a part.
#include "kernels.h"

#ifdef __aarch64__
#include <arm_neon.h>

#include "norm_loops.h"

namespace qat {
namespace {

// For every mask of four lanes the bytes of those whose bit is set, in order.
struct Compaction {
  uint8_t bytes[16][16];
  constexpr Compaction() : bytes{} {
    for (int mask = 0; mask < 16; ++mask) {
      for (int lane = 0, at = 0; lane < 4; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        for (int byte = 0; byte < 4; ++byte) bytes[mask][at++] = static_cast<uint8_t>(4 * lane + byte);
      }
    }
  }
};
constexpr Compaction compaction;

inline uint32_t lane_bits(uint32x4_t mask) {
  constexpr uint32_t one_each[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, vld1q_u32(one_each)));
}

inline uint16x4_t to_bfloat16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc0)));
}

inline uint32x4_t finite_lanes(float32x4_t a) {
  const uint32x4_t exponent = vdupq_n_u32(0x7f800000);
  return vmvnq_u32(vceqq_u32(vandq_u32(vreinterpretq_u32_f32(a), exponent), exponent));
}

inline float32x4_t keep_lanes(uint32x4_t mask, float32x4_t a) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
}

struct Vector {
  static constexpr int width = 8;  // a byte of the mask
  struct Float {
    float32x4_t a, b;
  };
  struct Mask {
    uint32x4_t a, b;  // all ones or zeros
  };

  static Float set(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
  static Float load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static Float load(const uint16_t* from) {
    const uint16x8_t halves = vld1q_u16(from);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
  }
  static void store(float* to, Float v) {
    vst1q_f32(to, v.a);
    vst1q_f32(to + 4, v.b);
  }
  static void store(uint16_t* to, Float v) { vst1q_u16(to, vcombine_u16(to_bfloat16(v.a), to_bfloat16(v.b))); }
  static Float div(Float x, Float y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static Float add(Float x, Float y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static Float sub(Float x, Float y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static Float mul(Float x, Float y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  // not fmin and fmax, for which -0 is less than +0
  static Float min(Float x, Float y) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
  }
  static Float max(Float x, Float y) {
    return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
  }
  static Float round(Float x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  static Mask ordered(Float x) { return equal(x, x); }
  static Mask finite(Float x) { return {finite_lanes(x.a), finite_lanes(x.b)}; }
  static Mask less(Float x, Float y) { return {vcltq_f32(x.a, y.a), vcltq_f32(x.b, y.b)}; }
  static Mask equal(Float x, Float y) { return {vceqq_f32(x.a, y.a), vceqq_f32(x.b, y.b)}; }
  static Mask both(Mask x, Mask y) { return {vandq_u32(x.a, y.a), vandq_u32(x.b, y.b)}; }
  static Float keep(Mask mask, Float x) { return {keep_lanes(mask.a, x.a), keep_lanes(mask.b, x.b)}; }
  static Float select(Mask mask, Float x, Float y) {
    return {vbslq_f32(mask.a, x.a, y.a), vbslq_f32(mask.b, x.b, y.b)};
  }
  static uint32_t bits(Mask mask) { return lane_bits(mask.a) | lane_bits(mask.b) << 4; }
  static int count(Mask mask) {
    return -vaddvq_s32(vaddq_s32(vreinterpretq_s32_u32(mask.a), vreinterpretq_s32_u32(mask.b)));
  }
  // Bins of the lanes that are not +0.0, side by side; writes at most a vector, and returns how many of it count.
  static int pack_bins(Float x, int shift, uint32_t* to) {
    const int first = pack_four(x.a, shift, to);
    return first + pack_four(x.b, shift, to + first);
  }
  static int pack_four(float32x4_t x, int shift, uint32_t* to) {
    const uint32x4_t pattern = vreinterpretq_u32_f32(x);
    const uint32_t kept = lane_bits(vtstq_u32(pattern, pattern));
    const uint32x4_t bins = vshlq_u32(pattern, vdupq_n_s32(-shift));
    const uint8x16_t packed = vqtbl1q_u8(vreinterpretq_u8_u32(bins), vld1q_u8(compaction.bytes[kept]));
    vst1q_u32(to, vreinterpretq_u32_u8(packed));
    return __builtin_popcount(kept);
  }
  static void store_masked(float* to, const float* from, uint32_t bits) {
    constexpr uint32_t one_each[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint32x4_t given = vdupq_n_u32(bits);
    store(to, keep({vtstq_u32(given, vld1q_u32(one_each)), vtstq_u32(given, vld1q_u32(one_each + 4))}, load(from)));
  }
  static void store_masked(uint16_t* to, const uint16_t* from, uint32_t bits) {
    constexpr uint16_t one_each[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t mask = vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), vld1q_u16(one_each));
    vst1q_u16(to, vandq_u16(mask, vld1q_u16(from)));
  }
};

constexpr Kernels kernels = all_kernels<Vector>("neon");

}  // namespace

const Kernels* neon_kernels() { return &kernels; }

}  // namespace qat

#else

const qat::Kernels* qat::neon_kernels() { return nullptr; }

#endif
