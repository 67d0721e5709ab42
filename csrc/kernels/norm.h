// Batch norm, activation and fake quantization in the passes over memory that batch norm makes anyway.
#pragma once

#include "ranges.h"

namespace qat {

// One value a channel. Sums run over parts that the shape alone decides, in double: no number of threads changes a bit.
struct Moments {
  double *sum, *square;
  float *low, *high;  // smallest and largest values
};
void channel_moments(const Kernels& kernels, ParallelFor parallel, const float* x, Layout layout,
                     const Moments& moments);

// Elements that keep what they are before fake quantization (QDrop): those whose number (drop_hash.h) is below `threshold`.
// Their places are those in memory.
struct Drop {
  int64_t seed;
  float threshold;
};

// What happens to x: v = x * factor + shift, by channel; clamped to `bounds`; fake-quantized where `grid` is given, some
// elements left out where `drop` is. With `clips` the gradients are those of a learned clip.
struct NormPass {
  const float *factor, *shift;
  Range bounds;
  const CodeGrid* grid;
  Range codes;
  bool clips = false;
  const Drop* drop = nullptr;
};

// bit i of `bits` (may be null) tells that v lies strictly between the bounds and its code was not clamped (with `clips`:
// and v not clipped), or is not fake-quantized. y may be x.
void norm_quantize(const Kernels& kernels, ParallelFor parallel, const float* x, float* y, uint8_t* bits, Layout layout,
                   const NormPass& pass);

// y = x + other; with `extrema` (one channel) also its range.
void add_tensors(const Kernels& kernels, ParallelFor parallel, const float* x, const float* other, float* y, int64_t n,
                 const ExtremaOut* extrema);

// Sums by channel of the gradient where the bits are set, and of its products with x.
void gradient_sums(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   Layout layout, double* sum, double* product);

// dx = where the bits are set factor * grad, plus slope * (x - center) + offset unless `slope` is null; by channel.
struct NormGradient {
  const float *factor, *slope, *center, *offset;
};
void norm_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   float* dx, Layout layout, const NormGradient& gradient);

}  // namespace qat
