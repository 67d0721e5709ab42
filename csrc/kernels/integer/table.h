// Functions of one tensor as tables, and PReLU (qat/integer/kernels/table.py). See quantize.h for what all operators
// share.
#pragma once

#include "view.h"

namespace qat {

// Entry i of `table` is the code of y for the code x.grid.qmin + i; it has x.grid.qmax - x.grid.qmin + 1 entries of the
// type of y. y may be x if their types have as many bytes.
void apply_table(const char* isa, const Threads& threads, const View& x, const void* table, const View& y);

// x where it is positive, slope * x elsewhere, with one slope (slopes 1) or one an index of `axis`. y may be x as
// above.
void prelu(const char* isa, const Threads& threads, const View& x, const float* slope, int64_t slopes, int32_t axis,
           const View& y);

}  // namespace qat
