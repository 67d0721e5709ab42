// Fake quantization on grids that follow the data: of weights, and of activations whose range is a moving average.
#pragma once

#include "training.h"

namespace qat {

// How a range becomes a scale and a zero point (docs/numerics.md); `middle` is the symmetric zero point.
struct GridRule {
  int64_t qmin, qmax;
  bool symmetric;
  int64_t middle;
  bool power_of_two;
};

struct CodeGrid {
  float scale;
  int32_t zero_point;
};

// A range with nan gives a scale of nan.
CodeGrid grid_of(double low, double high, const GridRule& rule);

// Smallest and largest values by channel, infinities included, nan where there is one.
template <class T>
void whole_range(const Kernels& kernels, ParallelFor parallel, const T* x, Layout layout, float* low, float* high);

// What a weight is multiplied by before it is quantized, and divided by afterwards: one value a channel.
struct Factor {
  const float* values;
  Layout layout;
};

// y = fake_quantize(w * factor) / factor, on the grids of `scale` and `zero_point` by channel, or, where `rule` is given,
// on those of the range of w * factor. `factor` and `bits` may be null.
template <class T>
void fake_quantize_weight(const Kernels& kernels, ParallelFor parallel, const T* w, T* y, uint8_t* bits, Layout layout,
                          const Factor* factor, float* scale, float* zero_point, const GridRule* rule, Range range);

// The buffers of an activation's quantizer, one value a channel. A range of which low is above high is none yet.
struct Tracked {
  float *low, *high, *scale;
  int32_t* zero_point;
};

// Moves the ranges towards those of a batch (the first batch sets them), leaves out channels that hold nan or infinities,
// and sets the grids where there is a range.
void track_range(const float* low, const float* high, int64_t channels, float momentum, const GridRule& rule,
                 const Tracked& tracked);

}  // namespace qat
