// Interpolation (qat/integer/kernels/resize.py). x is (N, H, W, C), y (N, H', W', C). See quantize.h for what all
// operators share.
#pragma once

#include "view.h"

namespace qat {

// index_h, index_w: the source of every row and column of y. Another grid than x's is requantized.
void resize_nearest(const char* isa, const Threads& threads, const View& x, const int32_t* index_h,
                    const int32_t* index_w, const View& y);

// The two neighbours of every index along a dimension of y, and how far it is from the low one, in [0, 1]: `_taps`
// gives it, and 0.5 where both neighbours are the same.
struct LinearTaps {
  const int32_t* low;
  const int32_t* high;
  const float* weight;
};
void resize_linear(const char* isa, const Threads& threads, const View& x, const LinearTaps& h, const LinearTaps& w,
                   const View& y);

}  // namespace qat
