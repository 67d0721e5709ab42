// ARMv8-A as it is (Cortex-A53, A57, A72): bytes multiplied to words, and pairs of words added to 32 bits.
//
// smull and sadalp make 8 products, so 16 take four instructions; a second product in 16 bits (smlal) would save one,
// and overflow for weights of -128.
#include "isa.h"

#ifdef __aarch64__
#include "neon_vector.h"

namespace qat {
namespace {

struct NeonVector : Vector {
  // 3 x 8 accumulators of two columns each
  template <int Units>
  static constexpr int rows = 3;
};

// A lane holds the first or the second two products of a group until the end.
struct PairSums {
  template <class V, int Units, int Rows, int Vectors>
  static inline __attribute__((always_inline)) void accumulate(const GemmBlock& g, int32_t first,
                                                               int32x4_t (&acc)[Rows][Vectors]) {
    int32x4_t low[Rows][Vectors], high[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) low[r][v] = high[r][v] = vdupq_n_s32(0);
    }
    const int8x8_t flip = vget_low_s8(V::flip(g.left_flip));
    for (int32_t t = 0; t < g.taps; ++t) {
      const uint8_t* left[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) left[r] = g.left[t * g.left_stride + first + r] + g.left_offset;
      const int8_t* right = g.right + g.right_taps[t] * g.right_tap_bytes;
      for (int64_t k = 0; k < int64_t{4} * g.depth; k += 4) {
        int8x8_t a[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          int32_t word;
          __builtin_memcpy(&word, left[r] + k, 4);
          a[r] = veor_s8(vreinterpret_s8_s32(vdup_n_s32(word)), flip);
        }
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          const int8x16_t b = vld1q_s8(right + v * 16);
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r) {
            low[r][v] = vpadalq_s16(low[r][v], vmull_s8(a[r], vget_low_s8(b)));
            high[r][v] = vpadalq_s16(high[r][v], vmull_s8(a[r], vget_high_s8(b)));
          }
        }
        right += Vectors * 16;
      }
    }
    add_biases<V>(g, first, acc);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) acc[r][v] = vaddq_s32(acc[r][v], vpaddq_s32(low[r][v], high[r][v]));
    }
  }
};

void gemm(const GemmBlock& block, int32_t) { gemm_units<NeonVector, 1, PairSums>(block); }

int64_t peak(int64_t steps) {
  constexpr int chains = 12;
  int32x4_t acc[chains];
  int8x8_t a = vdup_n_s8(1);
  const int8x8_t b = a;
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) acc[i] = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      // or the compiler multiplies once for all chains
      __asm__ volatile("" : "+w"(a));
      acc[i] = vpadalq_s16(acc[i], vmull_s8(a, b));
      __asm__ volatile("" : "+w"(acc[i]));
    }
  }
  return steps * chains * 8;
}

const Int8Kernels table{
    "neon", true, 1, {NeonVector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm, depthwise, depthwise_line, lookup, peak,
};

}  // namespace

const Int8Kernels* int8_neon() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_neon() { return nullptr; }
}  // namespace qat

#endif
