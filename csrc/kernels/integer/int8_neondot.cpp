// ARM with the dot product (ARMv8.2-A and later: Cortex-A55, A75, Neoverse N1). The build compiles this file with its
// option.
#include "isa.h"

#ifdef __ARM_FEATURE_DOTPROD
#include "neon_vector.h"

namespace qat {
namespace {

// A load of an activation is enough for four groups, of which sdot picks one.
struct LaneDots {
  template <class V, int Units, int Rows, int Vectors>
  static inline __attribute__((always_inline)) void accumulate(const GemmBlock& g, int32_t first,
                                                               int32x4_t (&acc)[Rows][Vectors]) {
    add_biases<V>(g, first, acc);
    const int8x16_t flip = V::flip(g.left_flip);
    for (int32_t t = 0; t < g.taps; ++t) {
      const uint8_t* left[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) left[r] = g.left[t * g.left_stride + first + r] + g.left_offset;
      const int8_t* right = g.right + g.right_taps[t] * g.right_tap_bytes;
      int32_t k = 0;
      for (; k + 4 <= g.depth; k += 4) {
        int8x16_t a[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) a[r] = V::bytes_at(left[r] + int64_t{4} * k, flip);
        step<0>(acc, a, right);
        step<1>(acc, a, right);
        step<2>(acc, a, right);
        step<3>(acc, a, right);
      }
      for (; k < g.depth; ++k) {
        int8x16_t a[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) a[r] = V::left(left[r] + int64_t{4} * k, flip);
        step<0>(acc, a, right);
      }
    }
  }

  template <int Lane, int Rows, int Vectors>
  static inline __attribute__((always_inline)) void step(int32x4_t (&acc)[Rows][Vectors], const int8x16_t (&a)[Rows],
                                                         const int8_t*& right) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const int8x16_t b = vld1q_s8(right + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) acc[r][v] = vdotq_laneq_s32(acc[r][v], b, a[r], Lane);
    }
    right += Vectors * 16;
  }
};

void gemm(const GemmBlock& block, int32_t) { gemm_units<Vector, 1, LaneDots>(block); }

int64_t peak(int64_t steps) {
  constexpr int chains = 24;
  int32x4_t acc[chains];
  const int8x16_t a = vdupq_n_s8(1);
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) acc[i] = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) {
      acc[i] = vdotq_s32(acc[i], a, a);
      // or the compiler sees that the loop is a product
      __asm__ volatile("" : "+w"(acc[i]));
    }
  }
  return steps * chains * 16;
}

const Int8Kernels table{
    "neondot", true, 1, {Vector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm, depthwise, depthwise_line, lookup, peak,
};

}  // namespace

const Int8Kernels* int8_neondot() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_neondot() { return nullptr; }
}  // namespace qat

#endif
