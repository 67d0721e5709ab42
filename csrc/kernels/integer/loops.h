// The innermost loops of the operators on codes, once an instruction set. Declarations only, as files of single
// instruction sets include this.
//
// A new instruction set is one file that includes loops_body.h, compiled with its options, and a line in loops.cpp.
#pragma once

#include <cstdint>

#include "grid.h"

namespace qat {

// Rows of two operands; a step is 1 or, where one element stands for the row, 0. Strides and steps are in elements.
struct BinaryRows {
  const void* a;
  const void* b;
  void* y;
  int64_t a_stride, b_stride, y_stride;
  int32_t a_step, b_step;
  int64_t rows, columns;
};

enum class Arithmetic : uint8_t { add, sub, mul, div };

struct Loops {
  // scale * (code - zero_point).
  void (*dequantize)(Type type, const Grid& grid, const void* x, int64_t n, float* y);
  // x / scale, half to even, nan becomes qmin.
  void (*quantize)(Type type, const Grid& grid, const float* x, int64_t n, void* y);

  // QLinearAdd and QLinearMul of 8-bit codes; the first grid is a's, then b's, then y's.
  void (*add)(const Type types[3], const Grid grids[3], const BinaryRows& rows);
  void (*mul)(const Type types[3], const Grid grids[3], const BinaryRows& rows);
  // a = a op b.
  void (*combine)(Arithmetic op, const float* b, int64_t n, float* a);
  // x where it is positive, slope * x elsewhere; step as above.
  void (*prelu)(const float* slope, int32_t step, int64_t n, float* x);

  // y = table[x]; y may be x.
  void (*lookup)(const uint8_t* table, const uint8_t* x, int64_t n, uint8_t* y);

  // The largest of `count` > 0 codes at each position; y may be one of the taps.
  void (*maximum)(Type type, const void* const* taps, int64_t count, int64_t n, void* y);
  // acc += codes of every row.
  void (*sum)(Type type, const void* x, int64_t rows, int64_t stride, int64_t n, int32_t* acc);
  // acc += scale * (code - zero_point).
  void (*sum_real)(Type type, const Grid& grid, const void* x, int64_t n, float* acc);
  // QLinearAveragePool: sum / count / scale + zero_point, half to even.
  void (*average)(Type type, const Grid& grid, const float* sum, float count, int64_t n, void* y);
  // Four positions of x, dequantized, by four weights, summed in order.
  void (*blend)(Type type, const Grid& grid, const void* const taps[4], const float weights[4], int64_t n, float* y);

  // Of every code less the largest one, plus 255: its share of 256.
  void (*shares)(const float exponentials[256], float sum, uint8_t share[256]);
  // One row of a layer normalization; weight and bias may be null.
  void (*layer_norm)(const Type types[2], const Grid grids[2], const void* x, int64_t n, const float* weight,
                     const float* bias, float epsilon, void* y);
};

const Loops& loops_portable();
const Loops& loops_avx2();
const Loops& loops_avx512();
const Loops& loops_neon();
// With vpermi2b.
void lookup_vbmi(const uint8_t* table, const uint8_t* x, int64_t n, uint8_t* y);

// Those for an `isa` of find_integer_isa, "" is the best. The processor must have it.
const Loops& find_loops(const char* isa);

}  // namespace qat
