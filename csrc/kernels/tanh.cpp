#include "tanh.h"

#include "ranges.h"
#include "blocks.h"

namespace qat {
namespace {

template <class Run>
void each_block(ParallelFor parallel, int64_t n, const Run& run) {
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += block) run(begin, std::min(begin + block, last) - begin);
  });
}

}  // namespace

float tanh_weight(const Kernels& kernels, ParallelFor parallel, const float* w, float* y, int64_t n) {
  float low = 0.0f, high = 0.0f, ratio = 1.0f;
  whole_range(kernels, parallel, w, {1, 1, n}, &low, &high);
  // a nan fails both comparisons
  const float largest = high >= -low ? high : -low;
  if (largest > 0.0f) {
    float reached = 0.0f;
    kernels.tanh.run(&largest, &reached, 1, 1.0f);
    ratio = largest / reached;
  }
  each_block(parallel, n, [&](int64_t at, int64_t count) { kernels.tanh.run(w + at, y + at, count, ratio); });
  return ratio;
}

void tanh_weight_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* w, float ratio,
                          float* dw, int64_t n) {
  each_block(parallel, n, [&](int64_t at, int64_t count) {
    kernels.tanh.gradient_run(grad + at, w + at, dw + at, count, ratio);
  });
}

}  // namespace qat
