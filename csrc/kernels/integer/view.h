// What every integer kernel takes: dense tensors with their grids, and threads.
//
// Tensors are row-major in their physical order. Those with spatial dimensions are stored channels last: (N, H, W, C).
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

constexpr int max_rank = 8;

struct View {
  void* data;
  Type type;
  int32_t rank;
  int64_t sizes[max_rank];
  Grid grid;  // meaningless for f32

  int64_t count() const {
    int64_t n = 1;
    for (int32_t d = 0; d < rank; ++d) n *= sizes[d];
    return n;
  }
};

// Calls task(begin, end, context) for parts of [begin, end) of at least `grain`, on several threads, and waits for all.
// Tasks must not throw. No result may depend on the number, the size or the order of the parts.
using Task = void (*)(int64_t begin, int64_t end, void* context);
struct Threads {
  void (*run)(void* pool, int64_t begin, int64_t end, int64_t grain, Task task, void* context);
  void* pool;
  int32_t count;
};

// Runs everything on the calling thread.
inline void run_serially(void*, int64_t begin, int64_t end, int64_t, Task task, void* context) {
  if (begin < end) task(begin, end, context);
}

// Which rounding turns an accumulator into a code (docs/numerics.md).
enum class Profile : uint8_t {
  onnx = 0,           // float32 multiplier, half to even
  tflite_double = 1,  // 31-bit multiplier and shift, SaturatingRoundingDoublingHighMul then RoundingDivideByPOT
  tflite_single = 2,  // 31-bit multiplier and shift, rounded once
};

}  // namespace qat
