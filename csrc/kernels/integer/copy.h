// Copies between tensors of any strides.
#pragma once

#include "nest.h"

namespace qat {

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns; elements of 1, 2 or 4 bytes.
void transpose_block(int64_t width, const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                     int64_t columns);

// Operand 0 of the nest to operand 1, elements of `width` bytes.
void copy_nest(const Threads& threads, int64_t width, const Nest& nest, const void* from, void* to);

}  // namespace qat
