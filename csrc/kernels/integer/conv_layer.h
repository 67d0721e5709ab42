// A convolution as it was prepared for one shape, for the files that prepare and run it.
//
//   conv.cpp            prepares and runs
//   conv_phases.cpp     which pixels and weights a row of the output takes
//   conv_blocks.cpp     blocks of rows times panels of columns, cut for threads
//   conv_depthwise.cpp  one channel a group
//   conv_fold.cpp       the copy of the activation for few input channels
//   winograd.cpp        3 x 3, in words
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "conv.h"
#include "pack.h"
#include "winograd.h"

namespace qat {

// Rows whose accumulators are kept for an epilogue that the kernels do not have.
constexpr int32_t raw_rows = 48;
constexpr int32_t padding = -1;

// The output positions that the same taps contribute to. A convolution has one phase, a transposed convolution of stride s
// one for each position modulo s.
struct Phase {
  std::vector<int32_t> taps;     // of the packed weights
  std::vector<int32_t> offsets;  // [pixel][tap] bytes from the start of an image, or `padding`
  std::vector<int32_t> pixels;   // output pixel of each row; empty: all, in order
  std::vector<int32_t> bias;     // one a padded column, with the zero points of the activations
  int64_t rows;                  // of one image
};

// When the activation becomes words for the kernels that multiply those: before the run, where several taps read a
// row, or by the block of rows.
enum class Words { never, ahead, by_block };

struct Block {
  int32_t phase;
  int64_t first, rows;
  int64_t start;  // in the work of all blocks: rows x units of columns
};

class ConvLayer {
 public:
  std::shared_ptr<const PackedWeights> weights;
  ConvShape shape;
  Type x, y;
  Grid x_grid;
  Epilogue epilogue;
  bool bytes;  // the kernels make the codes
  uint8_t left_flip;
  ByteEpilogue byte_epilogue;
  std::vector<float> multiplier;  // one a padded column
  std::vector<uint8_t> zero_row;
  uint8_t table[256];
  std::vector<Phase> phases;
  std::vector<Block> blocks;
  int64_t units;         // of all panels
  int64_t work;          // of all blocks
  int64_t block_pointers, block_rows;
  bool pointwise;        // row m reads pixel m
  bool lines;            // depthwise, line by line
  int64_t row_bytes;     // of a pixel row of the activation, of its copy for folded
  int64_t image_bytes;
  int64_t folded_bytes;  // of the copy
  std::unique_ptr<const Winograd> winograd;  // runs it instead, or null
  Words words;
  int64_t word_bytes;    // of the copy of the activation, or of one row of a block, as words

  int64_t block_word_bytes() const {
    return words == Words::by_block ? (block_rows * word_bytes + 127) / 64 * 64 : 0;
  }

  // Pointers, where rows go, and accumulators, for one part of the work.
  int64_t slot_bytes() const {
    const int64_t columns = weights->method == Method::depthwise ? weights->padded : max_units * unit_columns;
    const int64_t raw = bytes ? 0 : raw_rows * columns * 4;
    return block_pointers * 8 + (block_rows * 4 + 63) / 64 * 64 + raw + block_word_bytes();
  }
};

// Offsets of one dimension: input index of output `o` and tap `k`, or `padding`.
inline int32_t source(int32_t o, int32_t k, int32_t stride, int32_t pad, int32_t dilation, int32_t size, bool transposed) {
  if (!transposed) {
    const int64_t i = int64_t{o} * stride - pad + int64_t{k} * dilation;
    return i >= 0 && i < size ? static_cast<int32_t>(i) : padding;
  }
  const int64_t i = int64_t{o} + pad - int64_t{k} * dilation;
  return i >= 0 && i % stride == 0 && i / stride < size ? static_cast<int32_t>(i / stride) : padding;
}

// Of a code of the activation as the kernels read it.
inline int64_t left_bytes(const ConvLayer& l) { return l.words == Words::never ? 1 : 2; }

// Input columns of a line of a kernel of three columns.
inline int32_t line_columns(const ConvShape& s) { return (s.out_w - 1) * s.stride_w + 3; }

struct Run {
  const ConvLayer& layer;
  const Threads& threads;
  const uint8_t* x;  // or its copy
  int64_t x_bytes;   // of one of its codes
  uint8_t* y;
  const uint8_t* residual;
  int8_t* slots;
  int64_t parts;
};

// Adds the phase of the output positions that are phase_h, phase_w modulo the strides.
void add_phase(ConvLayer& l, int32_t phase_h, int32_t phase_w);

// One part of run.parts.
void run_part(const Run& run, int64_t part);

// Rows [begin, end) of a block; lines [begin, end) of all images. `raw`: accumulators of raw_rows.
void run_depthwise(const Run& run, const Block& block, int64_t begin, int64_t end, const uint8_t* const* pointers,
                   int32_t* raw);
void run_lines(const Run& run, int64_t begin, int64_t end, const uint8_t** pointers);

// Rows [begin, end) of the activation with their padding, so that a row of the kernel is one stretch of memory.
void fold_rows(const ConvLayer& l, const uint8_t* x, uint8_t* to, int64_t begin, int64_t end);

}  // namespace qat
