// AVX2 (x86-64). The build compiles this file, and only this one, with -mavx2.
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

#include "training_loops.h"

namespace qat {
namespace {

// For every mask the lanes whose bit is set, in order.
struct Compaction {
  uint8_t lanes[256][8];
  constexpr Compaction() : lanes{} {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, at = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][at++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr Compaction compaction;

struct Vector {
  static constexpr int width = 8;
  using Float = __m256;
  using Mask = __m256;  // all ones or zeros

  static Float set(float a) { return _mm256_set1_ps(a); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load(const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, Float a) { _mm256_storeu_ps(to, a); }
  static void store(uint16_t* to, Float a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i rounded = _mm256_srli_epi32(sum, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Mask ordered(Float a) { return _mm256_cmp_ps(a, a, _CMP_ORD_Q); }
  static Mask finite(Float a) {
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    const __m256i full = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(a), exponent), exponent);
    return _mm256_castsi256_ps(_mm256_xor_si256(full, _mm256_set1_epi32(-1)));
  }
  static Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static Float keep(Mask mask, Float a) { return _mm256_and_ps(a, mask); }
  static Float select(Mask mask, Float a, Float b) { return _mm256_blendv_ps(b, a, mask); }
  static uint32_t bits(Mask mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
  static int count(Mask mask) { return __builtin_popcount(bits(mask)); }
  // Bins of the lanes that are not +0.0, side by side; writes all of a vector, and returns how many of it count.
  static int pack_bins(Float a, int shift, uint32_t* to) {
    const __m256i pattern = _mm256_castps_si256(a);
    const __m256i zero = _mm256_cmpeq_epi32(pattern, _mm256_setzero_si256());
    const uint32_t kept = bits(_mm256_castsi256_ps(zero)) ^ 0xffu;
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(compaction.lanes[kept]));
    const __m256i bins = _mm256_srl_epi32(pattern, _mm_cvtsi32_si128(shift));
    const __m256i packed = _mm256_permutevar8x32_epi32(bins, _mm256_cvtepu8_epi32(order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
    return __builtin_popcount(kept);
  }
  static void store_masked(float* to, const float* from, uint32_t bits) {
    const __m256i one_each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), one_each);
    const __m256i mask = _mm256_cmpeq_epi32(set, one_each);
    _mm256_storeu_ps(to, _mm256_and_ps(_mm256_loadu_ps(from), _mm256_castsi256_ps(mask)));
  }
  static void store_masked(uint16_t* to, const uint16_t* from, uint32_t bits) {
    const __m128i one_each = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    const __m128i set = _mm_and_si128(_mm_set1_epi16(static_cast<short>(bits)), one_each);
    const __m128i mask = _mm_cmpeq_epi16(set, one_each);
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_and_si128(values, mask));
  }
};

constexpr Kernels kernels = all_kernels<Vector>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kernels; }

}  // namespace qat

#else

const qat::Kernels* qat::avx2_kernels() { return nullptr; }

#endif
