// What moves codes (qat/integer/kernels/layout.py). Elements have any type of 1, 2, 4 bytes, equal in x and y. See
// quantize.h for what all operators share.
#pragma once

#include "view.h"

namespace qat {

enum class PadMode : uint8_t { constant = 0, reflect = 1, replicate = 2 };

// pads: begin and end of every dimension in turn, not negative; of `reflect` less than the size. value: the code of
// constant padding.
void pad(const char* isa, const Threads& threads, const View& x, const int64_t* pads, PadMode mode, int32_t value,
         const View& y);

// Operands of other grids or types than y's are requantized.
void concat(const char* isa, const Threads& threads, const View* xs, int32_t count, int32_t axis, const View& y);

// Dimension d of y is dimension perm[d] of x.
void transpose(const char* isa, const Threads& threads, const View& x, const int64_t* perm, const View& y);

// Index i of dimension d of y is starts[d] + i * steps[d] of x; a negative step reverses.
void slice(const char* isa, const Threads& threads, const View& x, const int64_t* starts, const int64_t* steps,
           const View& y);

// Sizes of x broadcast to those of y as numpy's.
void expand(const char* isa, const Threads& threads, const View& x, const View& y);

// Index i of dimension d goes to (i + shifts[d]) mod size; any shifts.
void roll(const char* isa, const Threads& threads, const View& x, const int64_t* shifts, const View& y);

}  // namespace qat
