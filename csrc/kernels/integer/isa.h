// What one instruction set brings to the 8-bit convolution, matrix and depthwise kernels.
//
// A new instruction set is one file with a vector type (see `tile_loops.h` for what it must have) that fills an
// `Int8Kernels`, one line in `isa.cpp`, and its options in csrc/kernel_options.txt.
//
// All of them share the packed formats, whose unit is a group of four bytes of one output channel, for instructions that
// add the products of four pairs of bytes to a 32-bit lane (vpdpbusd, sdot):
//   panel of a matrix      [tap][depth / 4][column of the panel][4], at most 4 x 16 columns, padded with zeros; where the
//                          kernels multiply words (see `widen`), [tap][depth / 2][column of the panel][2], and where they
//                          multiply matrices (see `byte_group`), [tap][depth / 8][column of the panel][8]
//   block of a depthwise   [taps / 4][4 vectors][lane][4], 4 x width channels; lane l of vector q is channel
//                          l / 4 * 16 + q * 4 + l % 4, the order in which unpacking bytes and words interleaves four rows;
//                          of a kernel of 3 x 3 four taps are a column and one with the weight zero
#pragma once

#include <cstdint>

namespace qat {

// A 32-bit code v becomes the byte clamp(v + zero, low, high) ^ flip, where the clamp is one of unsigned bytes: signed
// codes are shifted by 128 (in zero, low and high) and flipped back.
struct ByteCodes {
  int16_t zero;
  uint8_t low, high, flip;

  // Saturation is all the clamp there is, and nothing is flipped.
  bool plain() const { return low == 0 && high == 255 && flip == 0; }
};

// From accumulators to bytes in profile `onnx`: v = float(acc) * multiplier, not above `high` where `bounded` says that v can
// leave int32, then either round(v) becomes the
// code or, with a residual,
//   own = round(max(v, low)) + zero_point; code = round(fma(left, left_ratio, fma(right, right_ratio, fixed)))
// where own and the residual are the operands in the order of `residual_first`.
struct ByteEpilogue {
  const float* multiplier;  // one a column
  float low, high;          // of the own result, less its zero point
  ByteCodes codes;
  bool bounded;
  bool add;
  bool residual_first;
  bool residual_signed;
  float zero_point;
  float own_ratio, residual_ratio, fixed;
  float sum_high;
};

// Some rows times one panel. Row r, tap t is read at left[t * left_stride + r] + left_offset, `depth` groups of four bytes,
// be it four codes or two words, or of `byte_group`.
struct GemmBlock {
  const uint8_t* const* left;
  int64_t left_stride;
  int64_t left_offset;
  uint8_t left_flip;  // what makes the codes unsigned (or signed, see Int8Kernels::signed_left): 0 or 0x80
  int32_t rows;
  int32_t taps;
  int32_t depth;
  const int8_t* right;
  const int32_t* right_taps;  // which tap of the panel belongs to tap t
  int64_t right_tap_bytes;
  const int32_t* bias;      // one a column of the panel
  const int32_t* row_bias;  // one a row, or null
  int32_t columns;          // that are written, of the units * 16
  int32_t* raw;             // accumulators (rows, units * 16), or null for codes
  const ByteEpilogue* epilogue;
  uint8_t* y;  // first column of row 0
  int64_t y_stride;
  const int32_t* y_rows;    // where in y row r goes; null: to row r
  const uint8_t* residual;  // laid out as y
};

// Rows of `channels` channels. Row r, tap t is read at left[r * taps + t]; whole blocks are read, so up to 63 bytes too
// many. `taps` is a multiple of four; taps that are only padding have zero weights, but a pointer that can be read.
struct DepthwiseBlock {
  const uint8_t* const* left;
  uint8_t left_flip;
  int32_t rows;
  int32_t taps;
  int32_t channels;
  const int8_t* right;
  const int32_t* bias;  // in the order of the lanes, as the multipliers
  int32_t* raw;         // accumulators (rows, padded channels) in the order of the channels, or null for codes
  int64_t raw_stride;
  const ByteEpilogue* epilogue;
  uint8_t* y;
  int64_t y_stride;
};

// Adjacent outputs of a kernel of 3 x 3 in one line. The rows of input column j are at left[j * 3], ...; output r takes the
// columns r * stride, ..., r * stride + 2. Read and packed as for DepthwiseBlock.
struct DepthwiseLine {
  const uint8_t* const* left;
  uint8_t left_flip;
  int32_t columns;
  int32_t stride;  // 1 or 2
  int32_t channels;
  const int8_t* right;
  const int32_t* bias;
  const ByteEpilogue* epilogue;
  uint8_t* y;
  int64_t y_stride;
};

constexpr int32_t unit_columns = 16;
constexpr int32_t max_units = 4;

// Tiles of 4 x 4 outputs and the 6 x 6 pixels that they need, see winograd.h.
constexpr int32_t winograd_size = 4, winograd_patch = 6, winograd_positions = 36;

// One tile, all channels.
struct WinogradInput {
  const uint8_t* const* pixels;  // of the patch; up to 15 bytes too many are read
  int32_t channels;
  uint8_t flip;
  int16_t zero;   // of the codes after the flip
  int16_t* words;  // position i is at i * position_stride; whole groups of 16 channels are written
  int64_t position_stride;
};

struct WinogradTile {
  int64_t pixel;  // of y, the upper left one
  int32_t rows, columns;  // that lie in the image
};

// Tiles of one panel of 16 columns.
struct WinogradOutput {
  const int32_t* sums;  // tile t and position i are at i * position_stride + t * 16
  int64_t position_stride;
  int32_t tiles;
  const WinogradTile* where;
  int64_t line;  // pixels of a line of y
  const int32_t* bias;
  int32_t columns;
  const ByteEpilogue* epilogue;
  uint8_t* y;
  int64_t y_stride;
  const uint8_t* residual;
};

struct WinogradKernels {
  void (*input)(const WinogradInput& in);
  void (*gemm)(const GemmBlock& block);  // a panel of words, [depth / 2][16][2], to accumulators
  void (*output)(const WinogradOutput& out);
};

struct Int8Kernels {
  const char* isa;
  // The activation is a signed byte in its products (ARM's sdot) and not an unsigned one (x86's vpdpbusd).
  bool signed_left;
  int32_t units;             // widest panel, in units of 16 columns
  int32_t rows[max_units];   // rows of the register tile of a panel of 1, 2, ... units: where work is best cut
  int32_t depthwise_block;   // 4 x width
  void (*gemm)(const GemmBlock& block, int32_t units);
  void (*depthwise)(const DepthwiseBlock& block);
  void (*depthwise_line)(const DepthwiseLine& line);
  // Bytes (rows, columns) to table[byte], in place.
  void (*lookup)(const uint8_t* table, uint8_t* y, int64_t rows, int64_t columns, int64_t stride);
  // `steps` times the multiply-accumulate instruction on registers only, for benchmarks; returns how many products that is.
  int64_t (*peak)(int64_t steps);
  // Null, or the matrix kernels multiply words: they read activations that this has made of bytes, to[i] = from[i] ^ flip
  // without a sign, and get no flip of their own. It may read up to 15 bytes too many, and write as many words.
  void (*widen)(const uint8_t* from, uint8_t flip, int64_t count, int16_t* to) = nullptr;

  // What one column has side by side in a panel, for the kernels that multiply bytes: 4, or 8 for a product of matrices.
  int32_t byte_group = 4;

  // Null, or what winograd.h is made of; for panels of one unit.
  const WinogradKernels* winograd = nullptr;

  // Inputs of a column side by side in a panel, and bytes of an activation in the matrix kernels.
  int32_t group() const { return widen == nullptr ? byte_group : 2; }
  int32_t left_bytes() const { return widen == nullptr ? 1 : 2; }
};

// Null where the build lacks the instructions; the processor is not asked.
const Int8Kernels* int8_avx512vnni();
const Int8Kernels* int8_avxvnni();
const Int8Kernels* int8_avx2();
const Int8Kernels* int8_i8mm();
const Int8Kernels* int8_neondot();
const Int8Kernels* int8_neon();
const Int8Kernels* int8_portable();

// "" is the best; null where it is unknown or cannot run. "avx512" stands for the best below or with 512 bits. `unchecked`
// takes a set that is named whether the processor has it or not.
const Int8Kernels* find_int8_kernels(const char* isa, bool unchecked = false);

}  // namespace qat
