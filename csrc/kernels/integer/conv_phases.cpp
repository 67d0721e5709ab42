#include "conv_layer.h"

namespace qat {

void add_phase(ConvLayer& l, int32_t phase_h, int32_t phase_w) {
  const PackedWeights& w = *l.weights;
  const ConvShape& s = l.shape;
  Phase phase;
  const bool folded = w.method == Method::folded;
  const int32_t kernel_w = folded ? 1 : w.kernel_w;
  const auto belongs = [&](int32_t position, int32_t stride, int32_t r) { return !s.transposed || position % stride == r; };
  if (w.method == Method::depthwise) phase.taps = w.order;
  for (int32_t t = 0; t < w.taps && w.method != Method::depthwise; ++t) {
    if (belongs(t / kernel_w * s.dilation_h, s.stride_h, phase_h) &&
        belongs(t % kernel_w * s.dilation_w, s.stride_w, phase_w)) {
      phase.taps.push_back(t);
    }
  }
  const int64_t pixel_bytes = w.inputs;
  for (int32_t oy = 0; oy < s.out_h; ++oy) {
    if (!belongs(oy + s.pad_top, s.stride_h, phase_h)) continue;
    for (int32_t ox = 0; ox < s.out_w; ++ox) {
      if (!belongs(ox + s.pad_left, s.stride_w, phase_w)) continue;
      if (s.transposed) phase.pixels.push_back(oy * s.out_w + ox);
      if (l.pointwise || l.lines) continue;
      for (int32_t t : phase.taps) {
        if (t < 0) {
          phase.offsets.push_back(padding);
          continue;
        }
        const int32_t iy =
            source(oy, t / kernel_w, s.stride_h, s.pad_top, s.dilation_h, s.in_h, s.transposed);
        // the copy of a folded row has its own padding
        const int64_t ix = folded ? 0
                                  : source(ox, t % kernel_w, s.stride_w, s.pad_left, s.dilation_w, s.in_w, s.transposed);
        const int64_t column = folded ? ox * (s.dilation_w == 1 ? int64_t{s.stride_w} * w.inputs : int64_t{w.depth})
                                      : ix * pixel_bytes;
        phase.offsets.push_back(iy < 0 || ix < 0 ? padding : static_cast<int32_t>(iy * l.row_bytes + column));
      }
    }
  }
  phase.rows = s.transposed ? static_cast<int64_t>(phase.pixels.size()) : int64_t{s.out_h} * s.out_w;
  if (phase.rows == 0) return;

  const int32_t x_zero = l.x_grid.zero_point + (l.left_flip == 0 ? 0 : l.x == Type::s8 ? 128 : -128);
  const auto bias = [&](int32_t output) {
    int64_t sum = 0;
    for (int32_t t : phase.taps) {
      if (t >= 0) sum += w.tap_sums[static_cast<size_t>(int64_t{t} * w.outputs + output)];
    }
    const int64_t own = l.epilogue.bias.empty() ? 0 : l.epilogue.bias[static_cast<size_t>(output)];
    return static_cast<int32_t>(static_cast<uint32_t>(own - x_zero * sum));
  };
  phase.bias.assign(static_cast<size_t>(w.padded), 0);
  if (w.method == Method::depthwise) {
    for (int32_t i = 0; i < w.padded; ++i) {
      const int32_t channel = depthwise_channel(i, w.kernels->depthwise_block);
      if (channel < w.outputs) phase.bias[static_cast<size_t>(i)] = bias(channel);
    }
  }
  for (const Panel& panel : w.panels) {
    for (int32_t c = 0; c < panel.columns; ++c) {
      phase.bias[static_cast<size_t>(panel.padded + c)] = bias(panel.first + c);
    }
  }
  l.phases.push_back(std::move(phase));
}

}  // namespace qat
