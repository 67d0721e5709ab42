#include <algorithm>

#include "conv_layer.h"
#include "requantize.h"

namespace qat {

void run_depthwise(const Run& run, const Block& block, int64_t begin, int64_t end, const uint8_t* const* pointers,
                   int32_t* raw) {
  const ConvLayer& l = run.layer;
  const PackedWeights& w = *l.weights;
  const Phase& phase = l.phases[static_cast<size_t>(block.phase)];
  ByteEpilogue epilogue = l.byte_epilogue;
  epilogue.multiplier = l.multiplier.data();
  DepthwiseBlock d{};
  d.left_flip = l.left_flip;
  d.taps = static_cast<int32_t>(phase.taps.size());
  d.channels = w.outputs;
  d.right = w.data.data();
  d.bias = phase.bias.data();
  d.raw = l.bytes ? nullptr : raw;
  d.raw_stride = w.padded;
  d.epilogue = &epilogue;
  d.y_stride = w.outputs;
  const int64_t step = l.bytes ? end - begin : raw_rows;
  for (int64_t r = begin; r < end; r += step) {
    d.left = pointers + r * d.taps;
    d.rows = static_cast<int32_t>(std::min(step, end - r));
    const int64_t at = (block.first + r) * w.outputs;
    d.y = run.y + at;
    w.kernels->depthwise(d);
    if (l.bytes) {
      if (l.epilogue.table != nullptr) w.kernels->lookup(l.table, d.y, 1, int64_t{d.rows} * w.outputs, 0);
      continue;
    }
    for (int32_t i = 0; i < d.rows; ++i) {
      finish(l.epilogue, raw + int64_t{i} * w.padded, 0, w.outputs, run.y, l.y, at + int64_t{i} * w.outputs,
             run.residual);
    }
  }
}

void run_lines(const Run& run, int64_t begin, int64_t end, const uint8_t** pointers) {
  const ConvLayer& l = run.layer;
  const PackedWeights& w = *l.weights;
  const ConvShape& s = l.shape;
  ByteEpilogue epilogue = l.byte_epilogue;
  epilogue.multiplier = l.multiplier.data();
  const int64_t y_bytes = int64_t{s.out_w} * w.outputs;
  const DepthwiseLine shared{pointers,      l.left_flip,   s.out_w,
                             s.stride_w,    w.outputs,     w.data.data(),
                             l.phases[0].bias.data(), &epilogue,  nullptr,
                             w.outputs};
  for (int64_t line = begin; line < end; ++line) {
    const uint8_t* image = run.x + line / s.out_h * l.image_bytes;
    for (int32_t k = 0; k < 3; ++k) {
      const int32_t iy =
          source(static_cast<int32_t>(line % s.out_h), k, s.stride_h, s.pad_top, s.dilation_h, s.in_h, false);
      for (int32_t j = 0; j < line_columns(s); ++j) {
        const int32_t ix = j - s.pad_left;
        const bool inside = iy >= 0 && ix >= 0 && ix < s.in_w;
        pointers[j * 3 + k] = inside ? image + iy * l.row_bytes + int64_t{ix} * w.inputs : l.zero_row.data();
      }
    }
    DepthwiseLine d = shared;
    d.y = run.y + line * y_bytes;
    w.kernels->depthwise_line(d);
    if (l.epilogue.table != nullptr) w.kernels->lookup(l.table, d.y, 1, y_bytes, 0);
  }
}

}  // namespace qat
