// Between float32 and codes, and from one grid to another (qat/integer/kernels/requantize.py).
//
// What holds for all operators of this folder beside conv.h:
//   isa       as in find_integer_isa, "" is the best.
//   threads   may run the parts of the work on any of them.
//   y         its data is written, whole; it may be the data of an operand only where the function says so.
//   Nothing is allocated, and nothing is read or written outside of the tensors.
//   Codes are taken to be within [qmin, qmax] of their grid; others give some code, no error.
#pragma once

#include "view.h"

namespace qat {

// float32 to codes by division, half to even, nan becomes qmin. Dimension d of y is dimension perm[d] of x; null: the
// same order.
void quantize(const char* isa, const Threads& threads, const View& x, const View& y, const int64_t* perm);

// Codes to float32, `perm` likewise.
void dequantize(const char* isa, const Threads& threads, const View& x, const View& y, const int64_t* perm);

// Codes of x to codes of y of any types and equal sizes; a copy where the grids are equal. y may be x if their types
// have many bytes.
void requantize(const char* isa, const Threads& threads, const View& x, const View& y);

}  // namespace qat
