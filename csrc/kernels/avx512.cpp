// AVX-512 F, BW, DQ and VL (x86-64). The build compiles this file, and only this one, with those options.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "training_loops.h"

namespace qat {
namespace {

struct Vector {
  static constexpr int width = 16;
  using Float = __m512;
  using Mask = __mmask16;

  static Float set(float a) { return _mm512_set1_ps(a); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, Float a) { _mm512_storeu_ps(to, a); }
  static void store(uint16_t* to, Float a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float round(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Mask ordered(Float a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
  static Mask finite(Float a) { return static_cast<Mask>(~_mm512_fpclass_ps_mask(a, 0x99)); }  // both nan, both inf
  static Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Float keep(Mask mask, Float a) { return _mm512_maskz_mov_ps(mask, a); }
  static Float select(Mask mask, Float a, Float b) { return _mm512_mask_blend_ps(mask, b, a); }
  static uint32_t bits(Mask mask) { return mask; }
  static int count(Mask mask) { return __builtin_popcount(mask); }
  // Bins of the lanes that are not +0.0, side by side; writes all of a vector, and returns how many of it count.
  static int pack_bins(Float a, int shift, uint32_t* to) {
    const __m512i pattern = _mm512_castps_si512(a);
    const __mmask16 kept = _mm512_test_epi32_mask(pattern, pattern);
    const __m512i bins = _mm512_srl_epi32(pattern, _mm_cvtsi32_si128(shift));
    // compressed in a register: storing under a mask is slow on some processors
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, bins));
    return __builtin_popcount(kept);
  }
  static void store_masked(float* to, const float* from, uint32_t bits) {
    _mm512_storeu_ps(to, _mm512_maskz_mov_ps(static_cast<Mask>(bits), _mm512_loadu_ps(from)));
  }
  static void store_masked(uint16_t* to, const uint16_t* from, uint32_t bits) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_mov_epi16(static_cast<Mask>(bits), values));
  }
};

constexpr Kernels kernels = all_kernels<Vector>("avx512");

}  // namespace

const Kernels* avx512_kernels() { return &kernels; }

}  // namespace qat

#else

const qat::Kernels* qat::avx512_kernels() { return nullptr; }

#endif
