// Pooling and means (qat/integer/kernels/pool.py). See quantize.h for what all operators share.
#pragma once

#include "view.h"

namespace qat {

// x is (N, H, W, C), y (N, H', W', C). Windows may extend beyond the end (ceil_mode); their number is y's.
struct PoolShape {
  int32_t kernel_h, kernel_w;
  int32_t stride_h, stride_w;
  int32_t pad_top, pad_left, pad_bottom, pad_right;
  int32_t dilation_h, dilation_w;  // 1 for an average
  bool count_include_pad;          // of an average
};

// Padding never wins. Types and grids are equal. Every window has an element of x.
void max_pool(const char* isa, const Threads& threads, const View& x, const PoolShape& shape, const View& y);

void avg_pool(const char* isa, const Threads& threads, const View& x, const PoolShape& shape, const View& y);

// Mean over `axes` (distinct, not negative). y has the other sizes of x in their order, whether or not the reduced ones
// are kept with size 1.
void mean(const char* isa, const Threads& threads, const View& x, const int64_t* axes, int32_t count, const View& y);

}  // namespace qat
