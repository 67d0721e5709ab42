// Weights whose channels are rows of memory: range, grid and fake quantization of a row while the cache holds it.
#pragma once

#include "ranges.h"

namespace qat {

// Tells whether `fake_quantize_rows` has a case: grid and factor by row, and rows that end on a byte of the mask.
bool has_weight_rows(const Layout& layout, const Factor* factor);

// `fake_quantize_weight`, in one pass over memory.
template <class T>
void fake_quantize_rows(const Kernels& kernels, ParallelFor parallel, const T* w, T* y, uint8_t* bits, Layout layout,
                        const Factor* factor, float* scale, float* zero_point, const GridRule* rule, Range range);

}  // namespace qat
