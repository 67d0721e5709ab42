#include "dropping.h"

namespace qat {

void place_numbers(const Kernels& kernels, ParallelFor parallel, int64_t seed, float* out, int64_t n) {
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      kernels.drop.place_numbers(drop_key(seed, begin), begin, out + begin, end - begin);
    }
  });
}

}  // namespace qat
