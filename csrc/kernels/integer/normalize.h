// Softmax and layer normalization (qat/integer/kernels/normalize.py, layer_norm.py). See quantize.h for what all
// operators share.
#pragma once

#include "view.h"

namespace qat {

// What a softmax of 8 bits needs of its grids and length; made once, used for every input.
struct SoftmaxTable {
  float exponentials[256];  // entry i: of a code less the largest one of its row, plus 255
  uint8_t result[256];      // code of y for a probability of i / 256
};
SoftmaxTable prepare_softmax(const Grid& x, const Grid& y, int64_t length);

// `length` of the table is x.sizes[axis]. The table may be null where x or y is `wide`.
void softmax(const char* isa, const Threads& threads, const View& x, int32_t axis, const SoftmaxTable* table,
             const View& y);

// Over the last `axes` dimensions; weight and bias have their sizes, or are null. y may be x if their types have as
// many bytes.
void layer_norm(const char* isa, const Threads& threads, const View& x, int32_t axes, const float* weight,
                const float* bias, float epsilon, const View& y);

}  // namespace qat
