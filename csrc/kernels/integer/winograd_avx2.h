// The transforms of winograd.h for AVX2. The file of an instruction set includes this.
#pragma once

#include <immintrin.h>

#include "tile_loops.h"

namespace qat {
namespace {

// B^T of six vectors of words, `step` apart, to six that are `to_step` apart.
inline __attribute__((always_inline)) void transform_words(const __m256i* from, int step, __m256i* to, int64_t to_step) {
  const __m256i d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step], d4 = from[4 * step],
                d5 = from[5 * step];
  const __m256i even = _mm256_sub_epi16(d4, _mm256_slli_epi16(d2, 2));
  const __m256i odd = _mm256_sub_epi16(d3, _mm256_slli_epi16(d1, 2));
  const __m256i four_two = _mm256_sub_epi16(d4, d2);
  const __m256i three_one = _mm256_slli_epi16(_mm256_sub_epi16(d3, d1), 1);
  const __m256i zero_two = _mm256_slli_epi16(_mm256_sub_epi16(d0, d2), 2);
  const __m256i results[6] = {
      _mm256_add_epi16(zero_two, four_two),
      _mm256_add_epi16(even, odd),
      _mm256_sub_epi16(even, odd),
      _mm256_add_epi16(four_two, three_one),
      _mm256_sub_epi16(four_two, three_one),
      _mm256_sub_epi16(_mm256_sub_epi16(d5, d3), _mm256_slli_epi16(three_one, 1)),
  };
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<int16_t*>(to) + i * to_step), results[i]);
  }
}

void winograd_input(const WinogradInput& in) {
  const __m128i flip = _mm_set1_epi8(static_cast<char>(in.flip));
  const __m256i zero = _mm256_set1_epi16(in.zero);
  for (int32_t c = 0; c < in.channels; c += 16) {
    __m256i middle[winograd_positions];
    for (int i = 0; i < winograd_patch; ++i) {
      __m256i line[winograd_patch];
#pragma GCC unroll 6
      for (int j = 0; j < winograd_patch; ++j) {
        const auto* from = reinterpret_cast<const __m128i*>(in.pixels[i * winograd_patch + j] + c);
        line[j] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_xor_si128(_mm_loadu_si128(from), flip)), zero);
      }
      transform_words(line, 1, middle + i * winograd_patch, 16);
    }
    for (int j = 0; j < winograd_patch; ++j) {
      int16_t* to = in.words + j * in.position_stride + c;
      transform_words(middle + j, winograd_patch, reinterpret_cast<__m256i*>(to), winograd_patch * in.position_stride);
    }
  }
}

// A'^T of six vectors, `step` apart.
inline __attribute__((always_inline)) void transform_sums(const int32_t* from, int64_t step, __m256i to[4]) {
  const auto load = [&](int64_t i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * step)); };
  const __m256i m0 = load(0), m1 = load(1), m2 = load(2), m3 = load(3), m4 = load(4), m5 = load(5);
  const __m256i p = _mm256_add_epi32(m1, m2), q = _mm256_sub_epi32(m2, m1);
  const __m256i r = _mm256_add_epi32(m3, m4), s = _mm256_sub_epi32(m3, m4);
  const __m256i twice = _mm256_slli_epi32(m0, 1), thrice = _mm256_slli_epi32(m5, 1);
  // 6 m0 - 4 p + r
  to[0] = _mm256_add_epi32(
      _mm256_sub_epi32(_mm256_add_epi32(twice, _mm256_slli_epi32(m0, 2)), _mm256_slli_epi32(p, 2)), r);
  to[1] = _mm256_add_epi32(_mm256_slli_epi32(q, 1), s);
  to[2] = _mm256_sub_epi32(r, p);
  // q + 2 s + 6 m5
  to[3] = _mm256_add_epi32(_mm256_add_epi32(q, _mm256_slli_epi32(s, 1)),
                           _mm256_add_epi32(thrice, _mm256_slli_epi32(m5, 2)));
}

template <class V>
void winograd_output(const WinogradOutput& out) {
  static_assert(V::width == 8, "vectors of 256 bits");
  // of 9, modulo 2^32
  const __m256i inverse = _mm256_set1_epi32(954437177);
  const Epilogue8<V> epilogue(*out.epilogue);
  const bool add = out.epilogue->add, bounded = out.epilogue->bounded;
  const float* multiplier = out.epilogue->multiplier;
  for (int32_t t = 0; t < out.tiles; ++t) {
    const WinogradTile& tile = out.where[t];
    alignas(32) __m256i results[16][2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int32_t* from = out.sums + int64_t{t} * unit_columns + v * 8;
      __m256i columns[winograd_patch][4];
      for (int i = 0; i < winograd_patch; ++i) {
        transform_sums(from + i * winograd_patch * out.position_stride, out.position_stride, columns[i]);
      }
      const __m256i bias = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out.bias + v * 8));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i pixel[4];
        transform_sums(reinterpret_cast<const int32_t*>(&columns[0][j]), 4 * 8, pixel);
        constexpr int powers[4] = {3, 2, 1, 1};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i exact = _mm256_srai_epi32(_mm256_mullo_epi32(pixel[i], inverse), powers[i] + powers[j]);
          results[i * 4 + j][v] = _mm256_add_epi32(exact, bias);
        }
      }
    }
    for (int32_t i = 0; i < tile.rows; ++i) {
      for (int32_t j = 0; j < tile.columns; ++j) {
        const int64_t at = (tile.pixel + i * out.line + j) * out.y_stride;
        __m256i codes[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const __m256i acc = results[i * 4 + j][v];
          const __m256 factor = V::load(multiplier + v * 8);
          codes[v] = add       ? epilogue.sum(acc, factor, out.residual + at + v * 8)
                     : bounded ? epilogue.bounded(acc, factor)
                               : epilogue.plain(acc, factor);
        }
        V::template store_columns<1>(out.y + at, codes, epilogue.bytes, out.columns);
      }
    }
  }
}

}  // namespace
}  // namespace qat
