// AVX2 and FMA without VNNI (x86-64). The build compiles this file with their options.
//
// Exact at the rate of the saturating loop: vpmaddubsw, vpmaddwd with ones and vpaddd make 32 products of
// two multiplications, and so do two vpmaddwd of words, whose sums of two products have 32 bits. So activations become words
// once, before all the columns that they meet, and weights, which stay bytes in memory, on their way to a register.
#include "isa.h"

#ifdef __AVX2__
#include "avx2_vector.h"
#include "winograd_avx2.h"

namespace qat {
namespace {

struct PairVector : Vector {
  static constexpr int group = 2;
  // 6 x 2 accumulators, two vectors of weights, one activation
  template <int Units>
  static constexpr int rows = 6;

  using Left = __m256i;
  using Right = __m256i;

  static Left left(const uint8_t* two_words, Flip) {
    int32_t pair;
    __builtin_memcpy(&pair, two_words, 4);
    return _mm256_set1_epi32(pair);
  }
  static Right right(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Int dot(Int acc, Left a, Right b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
};

void gemm(const GemmBlock& block, int32_t) { gemm_units<PairVector, 1>(block); }

// Weights that are words in memory.
struct WordVector : PairVector {
  static constexpr int group = 4;
  static Right right(const int8_t* from) { return bytes_at(from); }
};

void winograd_gemm(const GemmBlock& block) { gemm_units<WordVector, 1>(block); }

const WinogradKernels winograd{winograd_input, winograd_gemm, winograd_output<Vector>};

void widen(const uint8_t* from, uint8_t flip, int64_t count, int16_t* to) {
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (int64_t i = 0; i < count; i += 16) {
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)), flips);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepu8_epi16(bytes));
  }
}

// Of the saturating loop, on ones: the kernels are not to be slower for being exact.
int64_t peak(int64_t steps) {
  constexpr int chains = 12;
  __m256i acc[chains];
  __m256i a = _mm256_set1_epi8(1);
  const __m256i b = a, ones = _mm256_set1_epi16(1);
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      // or the compiler multiplies once for all chains
      __asm__ volatile("" : "+x"(a));
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      __asm__ volatile("" : "+x"(acc[i]));
    }
  }
  return steps * chains * 32;
}

const Int8Kernels table{
    "avx2",         false,  1,    {PairVector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm, depthwise,
    depthwise_line, lookup, peak, widen, 4, &winograd,
};

}  // namespace

const Int8Kernels* int8_avx2() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_avx2() { return nullptr; }
}  // namespace qat

#endif
