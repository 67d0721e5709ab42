// The codes behind the float inputs and outputs of a plan.
#pragma once

#include "plan.h"

namespace qat {

// The codes of an input or output: itself, or for floats what they are quantized to, or were dequantized from. Throws
// Error where there are none, or several grids.
const Array& border_codes(const Plan& plan, int32_t tensor, bool input);

}  // namespace qat
