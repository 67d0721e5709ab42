// Convolution of 16-bit activations, and of weights that leave 8 bits with their zero point, with exact 64-bit sums.
#pragma once

#include "pack.h"

namespace qat {

struct WideConv {
  const PackedWeights& weights;
  const ConvShape& shape;
  Type x;
  const Grid& x_grid;
  Type y;
  const Epilogue& epilogue;
};

void run_wide_conv(const WideConv& conv, const Threads& threads, const void* x, void* y, const void* residual);

}  // namespace qat
