#if defined(__x86_64__)
#include <immintrin.h>

#include "loops_body.h"

namespace qat {
namespace {

// A shuffle looks up 16 entries. Of the 16 such parts of the table, the right one leaves less than 16 of a code; in all
// others its highest bit is set, which gives 0.
void lookup_shuffled(const uint8_t* table, const uint8_t* x, int64_t n, uint8_t* y) {
  __m256i parts[16];
  for (int k = 0; k < 16; ++k) {
    parts[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table) + k));
  }
  const __m256i saturate = _mm256_set1_epi8(0x70);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    __m256i found = _mm256_setzero_si256();
    for (int k = 0; k < 16; ++k) {
      const __m256i rest = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(k * 16)));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(parts[k], _mm256_adds_epu8(rest, saturate)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), found);
  }
  lookup_plain(table, x + i, n - i, y + i);
}

}  // namespace

const Loops& loops_avx2() {
  static constexpr Loops loops = make_loops(lookup_shuffled);
  return loops;
}

}  // namespace qat
#endif
