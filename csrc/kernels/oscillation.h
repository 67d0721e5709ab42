// One step of the tracking of weights whose codes oscillate, and of their freezing (qat/train/oscillation.py).
#pragma once

#include "training.h"

namespace qat {

// `scale` and `zero_point` have one value a row (`by_row`), or one; `factor` one a row, or is null. The elements of the
// state are in the order of the weight.
void oscillation_step(const Kernels& kernels, ParallelFor parallel, float* weight, const OscillationState& state,
                      int64_t rows, int64_t inner, const float* scale, const float* zero_point, bool by_row,
                      const float* factor, Range codes, const OscillationRule& rule);

}  // namespace qat
