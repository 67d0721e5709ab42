// AVX2 with VNNI on 256 bits (x86-64: Alder Lake and later). The build compiles this file with its options.
#include "isa.h"

#ifdef __AVXVNNI__
#include "avx2_vector.h"

namespace qat {
namespace {

void gemm(const GemmBlock& block, int32_t) { gemm_units<Vector, 1>(block); }

int64_t peak(int64_t steps) {
  constexpr int chains = 12;
  __m256i acc[chains];
  const __m256i a = _mm256_set1_epi8(1), b = a;
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      acc[i] = Vector::dot(acc[i], a, b);
      __asm__ volatile("" : "+x"(acc[i]));
    }
  }
  return steps * chains * 32;
}

const Int8Kernels table{
    "avxvnni",      false,  1,    {Vector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm, depthwise,
    depthwise_line, lookup, peak, nullptr,
};

}  // namespace

const Int8Kernels* int8_avxvnni() { return &table; }

}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_avxvnni() { return nullptr; }
}  // namespace qat

#endif
