// The factor of a batch norm that a weight is multiplied by, element by element.
#pragma once

#include "host_device.h"

namespace qat::cuda {

// From the offset of an element in memory to its output channel. `group` is the dimension of the groups' rows, in a grouped
// transposed convolution; else it has one row.
struct ChannelMap {
  int64_t group_stride, group_size, rows;
  int64_t stride, size;

  QAT_HD int64_t operator()(int64_t at) const {
    return at / group_stride % group_size / rows * size + at / stride % size;
  }
};

// gamma / sqrt(var + eps), gamma no closer to zero than `floor`; null: ones.
struct BatchNorm {
  const float *gamma, *var;
  float eps, floor;
  ChannelMap channel;

  QAT_HD float operator()(int64_t at) const { return of_channel(channel(at)); }

  QAT_HD float of_channel(int64_t c) const {
    float g = gamma == nullptr ? 1.0f : gamma[c];
    const uint32_t sign = bits_of(g) & 0x80000000u, magnitude = bits_of(g) & 0x7fffffffu;
    if (float_of(magnitude) < floor) g = float_of(bits_of(floor) | sign);
    return divide(g, root(var[c] + eps));
  }
};

// The same where it was computed before.
struct Factors {
  const float* values;
  ChannelMap channel;

  QAT_HD float operator()(int64_t at) const { return values[channel(at)]; }
};

}  // namespace qat::cuda
