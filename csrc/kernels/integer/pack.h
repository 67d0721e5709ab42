// Weights in the order in which the kernels read them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "conv.h"
#include "isa.h"

namespace qat {

// Output channels of one group that are computed together.
struct Panel {
  int32_t group;
  int32_t first;    // output channel
  int32_t columns;  // output channels
  int32_t units;    // of 16 columns
  int32_t padded;   // position of the first in arrays of padded columns
  int64_t offset;   // of its bytes
};

enum class Method {
  gemm,       // a tap is a product of matrices
  folded,     // few input channels: a tap is a row of the kernel, over rows that were copied with their padding
  depthwise,  // one channel a group
  wide,       // 16-bit activations, or weights that leave 8 bits with their zero point: exact 64-bit sums
};

class AlignedBytes {
 public:
  explicit AlignedBytes(size_t size = 0);
  int8_t* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(int8_t* p) const { std::free(p); }
  };
  std::unique_ptr<int8_t, Free> data_;
};

// Splits `columns` into panels of nearly equal width, at most `max_units`; `depth` groups of `group` inputs,
// `taps` of them.
void split_panels(int32_t groups, int32_t columns, int32_t max_units, int64_t taps, int64_t depth, int32_t group,
                  std::vector<Panel>& panels);
// Columns and bytes of all panels.
int64_t padded_columns(const std::vector<Panel>& panels);
int64_t panel_bytes(const Panel& panel, int64_t taps, int64_t depth, int32_t group);

// Channel of position i of the padded depthwise arrays, see isa.h; `block` as in Int8Kernels.
inline int32_t depthwise_channel(int32_t i, int32_t block) {
  const int32_t width = block / 4;
  const int32_t q = i % block / width, l = i % width;
  return i / block * block + l / 4 * 16 + q * 4 + l % 4;
}

class PackedWeights;

// Of a kernel of 3 x 3 as winograd.h wants them.
struct WinogradWeights {
  explicit WinogradWeights(const PackedWeights& weights);

  AlignedBytes data;                // [panel][position][depth / 2][16][2] words
  int64_t panel_words;
  std::vector<int64_t> sums_above;  // of the positive weights of an output, of the negative ones
  std::vector<int64_t> sums_below;
};

class PackedWeights {
 public:
  // Made when first asked for; any number of threads may ask.
  const WinogradWeights& winograd() const;

  const Int8Kernels* kernels;
  Method method;
  int32_t outputs, inputs, groups, kernel_h, kernel_w;
  int32_t taps;   // of `method`: kernel_h for folded
  int32_t depth;  // input channels of a tap
  int32_t steps;  // depth / kernels->group(), rounded up
  int32_t padded; // columns
  std::vector<Panel> panels;       // gemm, folded
  AlignedBytes data;               // not wide
  std::vector<int16_t> wide;       // [output][tap][depth]
  std::vector<int32_t> order;      // depthwise: which tap stands where, or -1 for a weight of zero
  std::vector<int32_t> tap_sums;   // [tap][output], of the weights less their zero points

 private:
  mutable std::once_flag winograd_once_;
  mutable std::unique_ptr<WinogradWeights> winograd_;
};

}  // namespace qat
