// ARM with products of 8-bit matrices (ARMv8.6-A, or earlier with the extension: Cortex-A510, A710, Neoverse V1). The
// build compiles this file with its options.
#include "isa.h"

#ifdef __ARM_FEATURE_MATMUL_INT8
#include "neon_vector.h"

namespace qat {
namespace {

struct MatrixVector : Vector {
  // of one column, side by side
  static constexpr int group = 8;
};

// smmla multiplies two rows of eight activations by two columns of eight weights: an accumulator holds 2 x 2 of them.
struct Matrices {
  template <class V, int Units, int Rows, int Vectors>
  static inline __attribute__((always_inline)) void accumulate(const GemmBlock& g, int32_t first,
                                                               int32x4_t (&acc)[Rows][Vectors]) {
    constexpr int pairs = (Rows + 1) / 2, columns = Vectors * 2;
    int32x4_t square[pairs][columns];
#pragma GCC unroll 16
    for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 16
      for (int c = 0; c < columns; ++c) square[p][c] = vdupq_n_s32(0);
    }
    const int8x16_t flip = V::flip(g.left_flip);
    for (int32_t t = 0; t < g.taps; ++t) {
      // a single row stands for two
      const uint8_t* left[pairs * 2];
#pragma GCC unroll 16
      for (int r = 0; r < pairs * 2; ++r) {
        left[r] = g.left[t * g.left_stride + first + (r < Rows ? r : r - 1)] + g.left_offset;
      }
      const int8_t* right = g.right + g.right_taps[t] * g.right_tap_bytes;
      for (int64_t k = 0; k < int64_t{8} * g.depth; k += 8) {
        int8x16_t a[pairs];
#pragma GCC unroll 16
        for (int p = 0; p < pairs; ++p) {
          const uint8x16_t rows = vcombine_u8(vld1_u8(left[2 * p] + k), vld1_u8(left[2 * p + 1] + k));
          a[p] = veorq_s8(vreinterpretq_s8_u8(rows), flip);
        }
#pragma GCC unroll 16
        for (int c = 0; c < columns; ++c) {
          const int8x16_t b = vld1q_s8(right + c * 16);
#pragma GCC unroll 16
          for (int p = 0; p < pairs; ++p) square[p][c] = vmmlaq_s32(square[p][c], a[p], b);
        }
        right += columns * 16;
      }
    }
    add_biases<V>(g, first, acc);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        const int64x2_t one = vreinterpretq_s64_s32(square[r / 2][2 * v]);
        const int64x2_t two = vreinterpretq_s64_s32(square[r / 2][2 * v + 1]);
        const int64x2_t row = r % 2 == 0 ? vzip1q_s64(one, two) : vzip2q_s64(one, two);
        acc[r][v] = vaddq_s32(acc[r][v], vreinterpretq_s32_s64(row));
      }
    }
  }
};

void gemm(const GemmBlock& block, int32_t) { gemm_units<MatrixVector, 1, Matrices>(block); }

int64_t peak(int64_t steps) {
  constexpr int chains = 24;
  int32x4_t acc[chains];
  const int8x16_t a = vdupq_n_s8(1);
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) acc[i] = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) {
      acc[i] = vmmlaq_s32(acc[i], a, a);
      // or the compiler sees that the loop is a product
      __asm__ volatile("" : "+w"(acc[i]));
    }
  }
  return steps * chains * 32;
}

const Int8Kernels table{
    "i8mm",    true,           1,      {MatrixVector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm,
    depthwise, depthwise_line, lookup, peak,                             nullptr,           MatrixVector::group,
};

}  // namespace

const Int8Kernels* int8_i8mm() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_i8mm() { return nullptr; }
}  // namespace qat

#endif
