// Types of elements and grids. Declarations only: files of single instruction sets include this.
#pragma once

#include <cstdint>

namespace qat {

// The values are those of the plan file (docs/plan_format.md).
enum class Type : uint8_t {
  u8 = 1,
  s8 = 2,
  u16 = 3,
  s16 = 4,
  s32 = 5,
  f32 = 6,
  s4 = 7,  // two a byte, the even element in the low half; constants only
};

// real = scale * (code - zero_point), qmin <= code <= qmax. The range may be narrower than the type.
struct Grid {
  float scale;
  int32_t zero_point;
  int32_t qmin;
  int32_t qmax;
  // ONNX Runtime has no integer kernel for these codes (more than 8 bits, or 4-bit tensors): what reads or writes them
  // is computed in float32, see `QParams.wide` in qat/integer/kernels/qparams.py.
  bool wide;
};

// Which rounding turns an accumulator into a code (docs/numerics.md).
enum class Profile : uint8_t {
  onnx = 0,           // float32 multiplier, half to even
  tflite_double = 1,  // 31-bit multiplier and shift, SaturatingRoundingDoublingHighMul then RoundingDivideByPOT
  tflite_single = 2,  // 31-bit multiplier and shift, rounded once
};

}  // namespace qat
