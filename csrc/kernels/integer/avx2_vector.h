// The vector type of 256-bit x86, for the files of AVX2 and of AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "depthwise_loops.h"
#include "tile_loops.h"

namespace qat {
namespace {

struct Vector {
  static constexpr int width = 8;
  static constexpr int group = 4;
  template <int Units>
  static constexpr int rows = 4;

  using Int = __m256i;
  using Float = __m256;
  using Flip = __m256i;

  static __m256i bytes_at(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

#ifdef __AVXVNNI__
  using Left = __m256i;
  using Right = __m256i;
  static Left prepared(__m256i a) { return a; }
  static Right right(const int8_t* from) { return bytes_at(from); }
  static Int dot(Int acc, Left a, Right b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
#else
  // Bytes 0 and 2 of each lane as words, and bytes 1 and 3. vpmaddubsw would take the bytes, but its sums of two
  // products saturate at 16 bits; vpmaddwd's have 32.
  struct Words {
    __m256i even, odd;
  };
  using Left = Words;
  using Right = Words;
  static Left prepared(__m256i a) {
    return {_mm256_and_si256(a, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(a, 8)};
  }
  static Right right(const int8_t* from) {
    const __m256i b = bytes_at(from);
    return {_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), _mm256_srai_epi16(b, 8)};
  }
  static Int dot(Int acc, Left a, Right b) {
    const __m256i even = _mm256_madd_epi16(a.even, b.even);
    return _mm256_add_epi32(_mm256_add_epi32(acc, even), _mm256_madd_epi16(a.odd, b.odd));
  }
#endif

  struct Bytes {
    explicit Bytes(const ByteCodes& c)
        : zero(_mm256_set1_epi16(c.zero)),
          low(_mm256_set1_epi8(static_cast<char>(c.low))),
          high(_mm256_set1_epi8(static_cast<char>(c.high))),
          flip(_mm256_set1_epi8(static_cast<char>(c.flip))),
          plain(c.plain()) {}
    __m256i zero, low, high, flip;
    bool plain;
  };

  static Int load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store(int32_t* to, Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }
  static Int set(int32_t a) { return _mm256_set1_epi32(a); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float set(float a) { return _mm256_set1_ps(a); }
  static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static Int to_int(Float a) { return _mm256_cvtps_epi32(a); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  static Flip flip(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static Left left(const uint8_t* four, Flip flip) {
    int32_t word;
    __builtin_memcpy(&word, four, 4);
    return prepared(_mm256_xor_si256(_mm256_set1_epi32(word), flip));
  }
  template <int Rows>
  static void interleave(const uint8_t* const* from, int64_t offset, Flip flip, Left to[4]) {
    const __m256i a = _mm256_xor_si256(bytes_at(from[0] + offset), flip);
    const __m256i b = _mm256_xor_si256(bytes_at(from[1] + offset), flip);
    const __m256i c = _mm256_xor_si256(bytes_at(from[2] + offset), flip);
    const __m256i d = Rows == 4 ? _mm256_xor_si256(bytes_at(from[3] + offset), flip) : c;
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    to[0] = prepared(_mm256_unpacklo_epi16(ab_low, cd_low));
    to[1] = prepared(_mm256_unpackhi_epi16(ab_low, cd_low));
    to[2] = prepared(_mm256_unpacklo_epi16(ab_high, cd_high));
    to[3] = prepared(_mm256_unpackhi_epi16(ab_high, cd_high));
  }

  static Int codes(const uint8_t* from, bool is_signed) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
  }

  static __m256i pack(Int a, Int b, Int c, Int d, const Bytes& bytes) {
    const __m256i ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), bytes.zero);
    const __m256i cd = _mm256_adds_epi16(_mm256_packs_epi32(c, d), bytes.zero);
    const __m256i packed = _mm256_packus_epi16(ab, cd);
    if (bytes.plain) return packed;
    return _mm256_xor_si256(_mm256_min_epu8(_mm256_max_epu8(packed, bytes.low), bytes.high), bytes.flip);
  }

  static void store_some(uint8_t* to, __m256i bytes, int32_t count) {
    alignas(32) uint8_t buffer[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), bytes);
    __builtin_memcpy(to, buffer, static_cast<size_t>(count));
  }

  template <int Units>
  static void store_columns(uint8_t* to, const Int* c, const Bytes& bytes, int32_t columns) {
    static_assert(Units == 1, "16 registers hold no wider tile");
    const __m256i lanes = pack(c[0], c[1], c[0], c[1], bytes);
    const __m256i natural = _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    if (columns == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(natural));
    } else {
      store_some(to, natural, columns);
    }
  }

  static void store_interleaved(uint8_t* to, const Int c[4], const Bytes& bytes, int32_t channels) {
    const __m256i packed = pack(c[0], c[1], c[2], c[3], bytes);
    if (channels == 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
    } else {
      store_some(to, packed, channels);
    }
  }
};

void depthwise(const DepthwiseBlock& block) { depthwise_rows<Vector>(block); }

void depthwise_line(const DepthwiseLine& line) { depthwise_lines<Vector>(line); }

void lookup(const uint8_t* table, uint8_t* y, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) y[r * stride + c] = table[y[r * stride + c]];
  }
}

}  // namespace
}  // namespace qat
