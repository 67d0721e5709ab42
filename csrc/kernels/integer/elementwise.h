// Addition, subtraction, multiplication and division of two tensors of codes (qat/integer/kernels/elementwise.py).
//
// The sizes broadcast as numpy's: aligned at the last dimension. y may be an operand whose sizes it has, if their types
// have as many bytes. See quantize.h for what all operators share.
#pragma once

#include "view.h"

namespace qat {

// The operands are in the order in which ONNX Runtime adds them, which the last bit depends on: it swaps them where
// the left one is a scalar in its innermost loop (`_left_is_scalar`), and so has whoever wrote the plan, as only the
// sizes of the logical layout tell.
void add(const char* isa, const Threads& threads, const View& a, const View& b, const View& y);
void sub(const char* isa, const Threads& threads, const View& a, const View& b, const View& y);
void mul(const char* isa, const Threads& threads, const View& a, const View& b, const View& y);
// 0 / 0 becomes qmin.
void div(const char* isa, const Threads& threads, const View& a, const View& b, const View& y);

}  // namespace qat
