// The clip range with the least expected squared quantization error, from the counts of a histogram. What is computed,
// and why, is in qat/observers/clipping.py, of which this is the same search channel by channel.
#pragma once

#include "ranges.h"

namespace qat {

struct ClipTask {
  int mantissa_bits;
  // The weight of the errors of negative elements.
  double negative_weight;
  // Share by which a range must be better than the whole one.
  double margin;
  GridRule rule;
};

// counts: (channels, 2, 2^(8 + mantissa_bits)), the other elements before the negative ones, by growing magnitude. `low`
// and `high`, the smallest and the largest element of each channel, become the range.
void clip_ranges(const Kernels& kernels, ParallelFor parallel, const int64_t* counts, int64_t channels,
                 const ClipTask& task, double* low, double* high);

}  // namespace qat
