// Fake quantization and observation of whole tensors: the kernels of one instruction set, spread over threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace qat {

// Calls task(begin, end, context) for parts of [begin, end) on several threads and waits for all. It may throw what a
// task threw. The number and the order of the parts never change a result here: every reduction is exact (minimum,
// maximum, counts).
using ParallelTask = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelTask task, void* context);

// Dense memory as (outer, channels, inner), the last running fastest. Without channels: (1, 1, n).
struct Layout {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t size() const { return outer * channels * inner; }
};

// Where extrema go: low and high hold one value a channel and are widened, the count is added to.
struct ExtremaOut {
  float* low;
  float* high;
  int64_t* nonfinite;
};

// `scale` and `zero_point` have one value a channel. `bits` (ceil(n / 8) bytes, bits behind the last element zero) and
// `extrema` may be null. T is float, or uint16_t for bfloat16.
template <class T>
void fake_quantize(const Kernels& kernels, ParallelFor parallel, const T* x, T* y, uint8_t* bits, Layout layout,
                   const float* scale, const float* zero_point, Range range, const ExtremaOut* extrema);

template <class T>
void mask_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const uint8_t* bits, T* out, int64_t n);

// Writes the elements [begin, end), a block, or reads them for another purpose, before they are observed: while the block
// is in the cache.
struct BlockWriter {
  void (*write)(const void* context, int64_t begin, int64_t end) = nullptr;
  const void* context = nullptr;
  void operator()(int64_t begin, int64_t end) const {
    if (write != nullptr) write(context, begin, end);
  }
};

template <class T>
void observe_extrema(const Kernels& kernels, ParallelFor parallel, const T* x, Layout layout, ExtremaOut extrema,
                     BlockWriter writer = {});

}  // namespace qat
