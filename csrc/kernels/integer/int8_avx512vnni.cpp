// AVX-512 with VNNI and VBMI (x86-64: Ice Lake, Zen 4 and later). The build compiles this file with their options.
#include "isa.h"

#ifdef __AVX512VBMI__
#include <immintrin.h>

#include "depthwise_loops.h"
#include "tile_loops.h"

namespace qat {
namespace {

struct Vector {
  static constexpr int width = 16;
  static constexpr int group = 4;
  // as many as 32 registers hold next to the weights and one activation
  template <int Units>
  static constexpr int rows = Units == 4 ? 6 : Units == 3 ? 8 : Units == 2 ? 10 : 12;

  using Int = __m512i;
  using Float = __m512;
  using Flip = __m512i;
  using Left = __m512i;
  using Right = __m512i;

  struct Bytes {
    explicit Bytes(const ByteCodes& c)
        : zero(_mm512_set1_epi16(c.zero)),
          low(_mm512_set1_epi8(static_cast<char>(c.low))),
          high(_mm512_set1_epi8(static_cast<char>(c.high))),
          flip(_mm512_set1_epi8(static_cast<char>(c.flip))),
          plain(c.plain()) {}
    __m512i zero, low, high, flip;
    bool plain;
  };

  static Int load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store(int32_t* to, Int a) { _mm512_storeu_si512(to, a); }
  static Int set(int32_t a) { return _mm512_set1_epi32(a); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float set(float a) { return _mm512_set1_ps(a); }
  static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static Int to_int(Float a) { return _mm512_cvtps_epi32(a); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float round(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  static Flip flip(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static Left left(const uint8_t* four, Flip flip) {
    int32_t word;
    __builtin_memcpy(&word, four, 4);
    return _mm512_xor_si512(_mm512_set1_epi32(word), flip);
  }
  static Right right(const int8_t* from) { return _mm512_loadu_si512(from); }
  static Int dot(Int acc, Left a, Right b) { return _mm512_dpbusd_epi32(acc, a, b); }

  template <int Rows>
  static void interleave(const uint8_t* const* from, int64_t offset, Flip flip, Left to[4]) {
    const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(from[0] + offset), flip);
    const __m512i b = _mm512_xor_si512(_mm512_loadu_si512(from[1] + offset), flip);
    const __m512i c = _mm512_xor_si512(_mm512_loadu_si512(from[2] + offset), flip);
    const __m512i d = Rows == 4 ? _mm512_xor_si512(_mm512_loadu_si512(from[3] + offset), flip) : c;
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    to[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    to[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    to[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    to[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  }

  static Int codes(const uint8_t* from, bool is_signed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
  }

  static __m512i pack(Int a, Int b, Int c, Int d, const Bytes& bytes) {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), bytes.zero);
    const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), bytes.zero);
    const __m512i packed = _mm512_packus_epi16(ab, cd);
    if (bytes.plain) return packed;
    return _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(packed, bytes.low), bytes.high), bytes.flip);
  }

  static void store_bytes(uint8_t* to, __m512i bytes, int32_t count) {
    if (count >= 64) {
      _mm512_storeu_si512(to, bytes);
    } else {
      _mm512_mask_storeu_epi8(to, (uint64_t{1} << count) - 1, bytes);
    }
  }

  template <int Units>
  static void store_columns(uint8_t* to, const Int* c, const Bytes& bytes, int32_t columns) {
    const Int zero = _mm512_setzero_si512();
    const __m512i lanes = pack(c[0], Units > 1 ? c[1] : zero, Units > 2 ? c[2] : zero, Units > 3 ? c[3] : zero, bytes);
    // packing works within 128 bits
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i natural = _mm512_permutexvar_epi32(order, lanes);
    if (columns < Units * 16) {
      store_bytes(to, natural, columns);
    } else if constexpr (Units == 4) {
      _mm512_storeu_si512(to, natural);
    } else if constexpr (Units == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(natural));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(natural));
      if constexpr (Units == 3) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(natural, 2));
      }
    }
  }

  static void store_interleaved(uint8_t* to, const Int c[4], const Bytes& bytes, int32_t channels) {
    store_bytes(to, pack(c[0], c[1], c[2], c[3], bytes), channels);
  }
};

void gemm(const GemmBlock& block, int32_t units) {
  switch (units) {
    case 1: return gemm_units<Vector, 1>(block);
    case 2: return gemm_units<Vector, 2>(block);
    case 3: return gemm_units<Vector, 3>(block);
    default: return gemm_units<Vector, 4>(block);
  }
}

void depthwise(const DepthwiseBlock& block) { depthwise_rows<Vector>(block); }

void depthwise_line(const DepthwiseLine& line) { depthwise_lines<Vector>(line); }

void lookup(const uint8_t* table, uint8_t* y, int64_t rows, int64_t columns, int64_t stride) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += 64) {
      const int64_t count = columns - c;
      const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
      const __m512i index = _mm512_maskz_loadu_epi8(mask, y + r * stride + c);
      const __m512i low = _mm512_permutex2var_epi8(t0, index, t1);
      const __m512i high = _mm512_permutex2var_epi8(t2, index, t3);
      _mm512_mask_storeu_epi8(y + r * stride + c, mask, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
    }
  }
}

int64_t peak(int64_t steps) {
  constexpr int chains = 24;
  __m512i acc[chains], a = _mm512_set1_epi8(1), b = a;
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) {
      acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
      // or the compiler sees that the loop is a product
      __asm__ volatile("" : "+v"(acc[i]));
    }
  }
  return steps * chains * 64;
}

const Int8Kernels table{
    "avx512vnni",
    false,
    4,
    {Vector::rows<1>, Vector::rows<2>, Vector::rows<3>, Vector::rows<4>},
    4 * Vector::width,
    gemm,
    depthwise,
    depthwise_line,
    lookup,
    peak,
    nullptr,
};

}  // namespace

const Int8Kernels* int8_avx512vnni() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_avx512vnni() { return nullptr; }
}  // namespace qat

#endif
