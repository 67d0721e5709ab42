// The loops of the 8-bit kernels over a vector type V, for the file of one instruction set.
//
// V has `width` 32-bit lanes (a multiple of 4, at most 16) and static functions
//   Int load(const int32_t*), store(int32_t*, Int), set(int32_t), add(Int, Int)
//   Float load(const float*), set(float), to_float(Int), to_int(Float) (half to even; what is below int32 gives its minimum),
//   mul, min, max, add(Float, Float), round(Float) (half to even), fma(a, b, c)
//   Flip flip(uint8_t); Left left(const uint8_t* four, Flip): four bytes of activations in every lane
//   Right right(const int8_t*): `group` * width weights; Int dot(Int, Left, Right)
//   interleave<Rows>(const uint8_t* const from[Rows], int64_t offset, Flip, Left to[4]): 4 * width channels of four rows in the
//   order of isa.h, or of three and anything
//   Int codes(const uint8_t*, bool is_signed): `width` bytes as integers
//   store_columns<Units>(uint8_t*, const Int*, const Bytes&, int32_t columns), with Bytes made of ByteCodes
//   store_interleaved(uint8_t*, const Int[4], const Bytes&, int32_t channels)
// and the constants `template <int Units> int rows`, the rows of its tile, and `group`, see Int8Kernels.
#pragma once

#include "isa.h"

namespace qat {
namespace {

template <class V>
struct Epilogue8 {
  using Int = typename V::Int;
  using Float = typename V::Float;

  explicit Epilogue8(const ByteEpilogue& e)
      : bytes(e.codes),
        high(V::set(e.high)),
        low(V::set(e.low)),
        zero_point(V::set(e.zero_point)),
        left_ratio(V::set(e.residual_first ? e.residual_ratio : e.own_ratio)),
        right_ratio(V::set(e.residual_first ? e.own_ratio : e.residual_ratio)),
        fixed(V::set(e.fixed)),
        sum_high(V::set(e.sum_high)),
        residual_first(e.residual_first),
        residual_signed(e.residual_signed) {}

  Int plain(Int acc, Float multiplier) const { return V::to_int(V::mul(V::to_float(acc), multiplier)); }

  Int bounded(Int acc, Float multiplier) const {
    return V::to_int(V::min(V::mul(V::to_float(acc), multiplier), high));
  }

  Int sum(Int acc, Float multiplier, const uint8_t* residual) const {
    const Float clamped = V::max(V::min(V::mul(V::to_float(acc), multiplier), high), low);
    const Float own = V::add(V::round(clamped), zero_point);
    const Float other = V::to_float(V::codes(residual, residual_signed));
    const Float left = residual_first ? other : own;
    const Float right = residual_first ? own : other;
    return V::to_int(V::min(V::fma(left, left_ratio, V::fma(right, right_ratio, fixed)), sum_high));
  }

  typename V::Bytes bytes;
  Float high, low, zero_point, left_ratio, right_ratio, fixed, sum_high;
  bool residual_first, residual_signed;
};

// The biases that the accumulators of a tile start with.
template <class V, int Rows, int Vectors>
inline __attribute__((always_inline)) void add_biases(const GemmBlock& g, int32_t first,
                                                      typename V::Int (&acc)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    const typename V::Int bias = V::load(g.bias + v * V::width);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) acc[r][v] = bias;
  }
  if (g.row_bias != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const typename V::Int bias = V::set(g.row_bias[first + r]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) acc[r][v] = V::add(acc[r][v], bias);
    }
  }
}

// Groups of bytes by dot products, a register an activation.
struct Dots {
  template <class V, int Units, int Rows, int Vectors>
  static inline __attribute__((always_inline)) void accumulate(const GemmBlock& g, int32_t first,
                                                               typename V::Int (&acc)[Rows][Vectors]) {
    add_biases<V>(g, first, acc);
    const typename V::Flip flip = V::flip(g.left_flip);
    for (int32_t t = 0; t < g.taps; ++t) {
      const uint8_t* left[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) left[r] = g.left[t * g.left_stride + first + r] + g.left_offset;
      const int8_t* right = g.right + g.right_taps[t] * g.right_tap_bytes;
      const int64_t end = int64_t{4} * g.depth;
      for (int64_t k = 0; k < end; k += 4) {
        typename V::Right b[Vectors];
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) b[v] = V::right(right + v * V::width * V::group);
        right += Units * unit_columns * V::group;
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const typename V::Left a = V::left(left[r] + k, flip);
#pragma GCC unroll 16
          for (int v = 0; v < Vectors; ++v) acc[r][v] = V::dot(acc[r][v], a, b[v]);
        }
      }
    }
  }
};

// Accumulates in the way of Sums, then makes the codes.
template <class V, class Sums, int Rows, int Units>
void tile(const GemmBlock& g, const Epilogue8<V>* epilogue, int32_t first) {
  using Int = typename V::Int;
  constexpr int vectors = Units * unit_columns / V::width;
  Int acc[Rows][vectors];
  Sums::template accumulate<V, Units>(g, first, acc);
  if (g.raw != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      int32_t* to = g.raw + int64_t{first + r} * Units * unit_columns;
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) V::store(to + v * V::width, acc[r][v]);
    }
    return;
  }
  const float* multiplier = g.epilogue->multiplier;
  const bool add = g.epilogue->add, bounded = g.epilogue->bounded;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const int64_t offset = (g.y_rows == nullptr ? int64_t{first + r} : int64_t{g.y_rows[first + r]}) * g.y_stride;
    if (add) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        acc[r][v] =
            epilogue->sum(acc[r][v], V::load(multiplier + v * V::width), g.residual + offset + v * V::width);
      }
    } else if (bounded) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) acc[r][v] = epilogue->bounded(acc[r][v], V::load(multiplier + v * V::width));
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) acc[r][v] = epilogue->plain(acc[r][v], V::load(multiplier + v * V::width));
    }
    V::template store_columns<Units>(g.y + offset, acc[r], epilogue->bytes, g.columns);
  }
}

// A tile of as many rows as there are registers, then smaller ones for what is left.
template <class V, int Units, class Sums = Dots>
void gemm_units(const GemmBlock& g) {
  constexpr int rows = V::template rows<Units>;
  const ByteEpilogue none{};
  const Epilogue8<V> epilogue(g.epilogue == nullptr ? none : *g.epilogue);
  int32_t r = 0;
  for (; r + rows <= g.rows; r += rows) tile<V, Sums, rows, Units>(g, &epilogue, r);
  if constexpr (rows > 4) {
    for (; r + 4 <= g.rows; r += 4) tile<V, Sums, 4, Units>(g, &epilogue, r);
  }
  if constexpr (rows > 2) {
    for (; r + 2 <= g.rows; r += 2) tile<V, Sums, 2, Units>(g, &epilogue, r);
  }
  for (; r < g.rows; ++r) tile<V, Sums, 1, Units>(g, &epilogue, r);
}

}  // namespace
}  // namespace qat
