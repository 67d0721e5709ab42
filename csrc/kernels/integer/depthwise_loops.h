// The loops of the depthwise kernels over a vector type V, see `tile_loops.h`.
#pragma once

#include "tile_loops.h"

namespace qat {
namespace {

template <class V>
void depthwise_rows(const DepthwiseBlock& d) {
  using Int = typename V::Int;
  constexpr int block = 4 * V::width;
  const typename V::Flip flip = V::flip(d.left_flip);
  const ByteEpilogue none{};
  const Epilogue8<V> epilogue(d.epilogue == nullptr ? none : *d.epilogue);
  for (int32_t c = 0; c < d.channels; c += block) {
    const int8_t* weights = d.right + int64_t{c} * d.taps;
    const int32_t left_over = d.channels - c;
    for (int32_t r = 0; r < d.rows; ++r) {
      const uint8_t* const* taps = d.left + int64_t{r} * d.taps;
      Int acc[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) acc[q] = V::load(d.bias + c + q * V::width);
      const int8_t* right = weights;
      for (int32_t t = 0; t < d.taps; t += 4) {
        typename V::Left a[4];
        V::template interleave<4>(taps + t, c, flip, a);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) acc[q] = V::dot(acc[q], a[q], V::right(right + q * V::width * 4));
        right += 4 * block;
      }
      if (d.raw != nullptr) {
        int32_t lanes[block];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) V::store(lanes + q * V::width, acc[q]);
        int32_t* to = d.raw + r * d.raw_stride + c;
        for (int i = 0; i < block; ++i) {
          const int q = i / V::width, l = i % V::width;
          to[l / 4 * 16 + q * 4 + l % 4] = lanes[i];
        }
        continue;
      }
      const float* multiplier = d.epilogue->multiplier + c;
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) acc[q] = epilogue.bounded(acc[q], V::load(multiplier + q * V::width));
      V::store_interleaved(d.y + r * d.y_stride + c, acc, epilogue.bytes, left_over < block ? left_over : block);
    }
  }
}

// A kernel of three columns keeps the interleaved input columns that the next output needs too.
template <class V, int Stride>
void depthwise_line(const DepthwiseLine& d) {
  using Int = typename V::Int;
  constexpr int block = 4 * V::width;
  const typename V::Flip flip = V::flip(d.left_flip);
  const Epilogue8<V> epilogue(*d.epilogue);
  const bool bounded = d.epilogue->bounded;
  for (int32_t c = 0; c < d.channels; c += block) {
    const int8_t* right = d.right + int64_t{c} * 12;
    const float* multiplier = d.epilogue->multiplier + c;
    const int32_t left_over = d.channels - c < block ? d.channels - c : block;
    // loaded once, as some instruction sets have to unpack them
    typename V::Right weights[3][4];
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) weights[k][q] = V::right(right + k * 4 * block + q * V::width * 4);
    }
    typename V::Left column[3][4];
#pragma GCC unroll 3
    for (int k = 0; k < 3 - Stride; ++k) V::template interleave<3>(d.left + 3 * k, c, flip, column[k]);
    for (int32_t r = 0; r < d.columns; ++r) {
#pragma GCC unroll 3
      for (int k = 3 - Stride; k < 3; ++k) {
        V::template interleave<3>(d.left + 3 * (int64_t{r} * Stride + k), c, flip, column[k]);
      }
      Int acc[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        acc[q] = V::load(d.bias + c + q * V::width);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          acc[q] = V::dot(acc[q], column[k][q], weights[k][q]);
        }
        const typename V::Float factor = V::load(multiplier + q * V::width);
        acc[q] = bounded ? epilogue.bounded(acc[q], factor) : epilogue.plain(acc[q], factor);
      }
      V::store_interleaved(d.y + r * d.y_stride + c, acc, epilogue.bytes, left_over);
#pragma GCC unroll 3
      for (int k = 0; k < 3 - Stride; ++k) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) column[k][q] = column[k + Stride][q];
      }
    }
  }
}

template <class V>
void depthwise_lines(const DepthwiseLine& d) {
  if (d.stride == 1) {
    depthwise_line<V, 1>(d);
  } else {
    depthwise_line<V, 2>(d);
  }
}

}  // namespace
}  // namespace qat
