#include "conv.h"

#include <algorithm>
#include <cstring>

#include "pack.h"
#include "parts.h"
#include "requantize.h"
#include "wide.h"
#include "winograd.h"

namespace qat {
namespace {

// What a block of rows may take: the pointers, and the activations that stay in the second-level cache for all panels.
constexpr int64_t max_pointers = 8192;
constexpr int64_t max_left_bytes = 256 * 1024;
// Rows whose accumulators are kept for an epilogue that the kernels do not have.
constexpr int32_t raw_rows = 48;
// Less work than this is not worth a second thread.
constexpr int64_t serial_products = 200 * 1000;
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

}  // namespace

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

namespace {

// Offsets of one dimension: input index of output `o` and tap `k`, or `padding`.
int32_t source(int32_t o, int32_t k, int32_t stride, int32_t pad, int32_t dilation, int32_t size, bool transposed) {
  if (!transposed) {
    const int64_t i = int64_t{o} * stride - pad + int64_t{k} * dilation;
    return i >= 0 && i < size ? static_cast<int32_t>(i) : padding;
  }
  const int64_t i = int64_t{o} + pad - int64_t{k} * dilation;
  return i >= 0 && i % stride == 0 && i / stride < size ? static_cast<int32_t>(i / stride) : padding;
}

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

// What stands outside the image, as the kernels read it from there.
void fill_zero_row(ConvLayer& l) {
  const auto count = static_cast<size_t>(std::max(l.weights->inputs, l.weights->depth) + 128);
  const auto zero = static_cast<uint8_t>(l.x_grid.zero_point);
  l.zero_row.assign(count, zero);
  if (l.words != Words::ahead) return;
  l.zero_row.resize(count * 2 + 32);
  const std::vector<uint8_t> bytes(count + 16, zero);
  l.weights->kernels->widen(bytes.data(), l.left_flip, static_cast<int64_t>(count),
                            reinterpret_cast<int16_t*>(l.zero_row.data()));
}

void fill_multipliers(ConvLayer& l) {
  const PackedWeights& w = *l.weights;
  l.byte_epilogue = byte_epilogue(l.epilogue, l.y);
  l.multiplier.assign(static_cast<size_t>(w.padded), 0.0f);
  if (w.method == Method::depthwise) {
    for (int32_t i = 0; i < w.padded; ++i) {
      const int32_t channel = depthwise_channel(i, w.kernels->depthwise_block);
      if (channel < w.outputs) {
        l.multiplier[static_cast<size_t>(i)] = l.epilogue.multiplier[static_cast<size_t>(channel)];
      }
    }
  }
  for (const Panel& panel : w.panels) {
    for (int32_t c = 0; c < panel.columns; ++c) {
      l.multiplier[static_cast<size_t>(panel.padded + c)] = l.epilogue.multiplier[static_cast<size_t>(panel.first + c)];
    }
  }
}

// Of a code of the activation as the kernels read it.
int64_t left_bytes(const ConvLayer& l) { return l.words == Words::never ? 1 : 2; }

// Input columns of a line of a kernel of three columns.
int32_t line_columns(const ConvShape& s) { return (s.out_w - 1) * s.stride_w + 3; }

void split_blocks(ConvLayer& l) {
  const PackedWeights& w = *l.weights;
  l.units = w.method == Method::depthwise ? 1 : w.padded / unit_columns;
  l.block_pointers = l.block_rows = l.work = 0;
  if (l.lines) {
    l.work = l.shape.batch * l.shape.out_h;
    l.block_pointers = (line_columns(l.shape) * 3 + 7) / 8 * 8;
    return;
  }
  for (size_t p = 0; p < l.phases.size(); ++p) {
    const int64_t rows = l.phases[p].rows * l.shape.batch;
    const int64_t pointers = std::max<int64_t>(static_cast<int64_t>(l.phases[p].taps.size()), 1);
    const int64_t strides = l.shape.transposed ? 1 : int64_t{l.shape.stride_h} * l.shape.stride_w;
    const int64_t bytes = std::max<int64_t>(std::min<int64_t>(pointers, strides) * w.depth * left_bytes(l), 1);
    const int64_t most = std::max<int64_t>(std::min(max_pointers / pointers, max_left_bytes / bytes), 24);
    const int64_t count = (rows + most - 1) / most;
    const int64_t each = ((rows + count - 1) / count + 23) / 24 * 24;
    for (int64_t first = 0; first < rows; first += each) {
      const int64_t size = std::min(each, rows - first);
      l.blocks.push_back({static_cast<int32_t>(p), first, size, l.work});
      l.work += size * l.units;
      l.block_pointers = std::max(l.block_pointers, (size * pointers + 7) / 8 * 8);
      l.block_rows = std::max(l.block_rows, size);
    }
  }
}

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

// [tap][row], and [row][tap] for depthwise.
void fill_pointers(const Run& run, const Block& block, const uint8_t** to) {
  const ConvLayer& l = run.layer;
  const Phase& phase = l.phases[static_cast<size_t>(block.phase)];
  if (l.pointwise) {
    for (int64_t r = 0; r < block.rows; ++r) to[r] = run.x + (block.first + r) * l.weights->inputs;
    return;
  }
  const auto taps = static_cast<int64_t>(phase.taps.size());
  const bool depthwise = l.weights->method == Method::depthwise;
  const int64_t row_step = depthwise ? taps : 1;
  const int64_t tap_step = depthwise ? 1 : block.rows;
  const uint8_t* zero = l.zero_row.data();
  int64_t pixel = block.first % phase.rows;
  const int64_t image_bytes = l.image_bytes * run.x_bytes;
  const uint8_t* image = run.x + block.first / phase.rows * image_bytes;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int32_t* offsets = phase.offsets.data() + pixel * taps;
    for (int64_t t = 0; t < taps; ++t) {
      to[r * row_step + t * tap_step] = offsets[t] < 0 ? zero : image + offsets[t] * run.x_bytes;
    }
    if (++pixel == phase.rows) {
      pixel = 0;
      image += image_bytes;
    }
  }
}

// Copies rows [begin, end) of a block of one tap as words, and points there.
void widen_rows(const Run& run, int64_t begin, int64_t end, const uint8_t** pointers, int8_t* to) {
  const ConvLayer& l = run.layer;
  const auto words = [&](int64_t r) { return reinterpret_cast<int16_t*>(to + r * l.word_bytes); };
  const auto widen = l.weights->kernels->widen;
  if (l.pointwise && begin < end) widen(pointers[begin], l.left_flip, (end - begin) * l.weights->inputs, words(begin));
  for (int64_t r = begin; r < end; ++r) {
    if (!l.pointwise) widen(pointers[r], l.left_flip, l.weights->inputs, words(r));
    pointers[r] = reinterpret_cast<const uint8_t*>(words(r));
  }
}

void fill_rows(const Run& run, const Block& block, int32_t* to) {
  const Phase& phase = run.layer.phases[static_cast<size_t>(block.phase)];
  const int64_t pixels = int64_t{run.layer.shape.out_h} * run.layer.shape.out_w;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.first + r;
    to[r] = static_cast<int32_t>(row / phase.rows * pixels) + phase.pixels[static_cast<size_t>(row % phase.rows)];
  }
}

// Rows [begin, end) of a block times one panel.
void run_panel(const Run& run, const Block& block, const Panel& panel, int64_t begin, int64_t end,
               const uint8_t* const* pointers, const int32_t* rows, int32_t* raw) {
  const ConvLayer& l = run.layer;
  const PackedWeights& w = *l.weights;
  const Phase& phase = l.phases[static_cast<size_t>(block.phase)];
  ByteEpilogue epilogue = l.byte_epilogue;
  epilogue.multiplier = l.multiplier.data() + panel.padded;
  GemmBlock g{};
  g.left_stride = block.rows;
  g.left_offset = int64_t{panel.group} * w.depth * left_bytes(l);
  g.left_flip = l.words == Words::never ? l.left_flip : 0;
  g.taps = static_cast<int32_t>(phase.taps.size());
  g.depth = w.steps;
  g.right = w.data.data() + panel.offset;
  g.right_taps = phase.taps.data();
  g.right_tap_bytes = panel_bytes(panel, 1, w.steps, w.kernels->group());
  g.bias = phase.bias.data() + panel.padded;
  g.columns = panel.columns;
  g.epilogue = &epilogue;
  g.y_stride = w.outputs;
  const int64_t step = l.bytes ? end - begin : raw_rows;
  for (int64_t r = begin; r < end; r += step) {
    // without a list of rows, row 0 of the kernel is row r of the block
    const int64_t at = panel.first + (rows == nullptr ? (block.first + r) * w.outputs : 0);
    g.left = pointers + r;
    g.rows = static_cast<int32_t>(std::min(step, end - r));
    g.y_rows = rows == nullptr ? nullptr : rows + r;
    if (l.bytes) {
      g.y = run.y + at;
      g.residual = run.residual == nullptr ? nullptr : run.residual + at;
    } else {
      g.raw = raw;
    }
    w.kernels->gemm(g, panel.units);
    for (int32_t i = 0; i < g.rows && (!l.bytes || l.epilogue.table != nullptr); ++i) {
      const int64_t row = at + (rows == nullptr ? i : rows[r + i]) * int64_t{w.outputs};
      if (!l.bytes) {
        finish(l.epilogue, raw + int64_t{i} * panel.units * unit_columns, panel.first, panel.columns, run.y, l.y, row,
               run.residual);
      } else if (rows != nullptr) {
        w.kernels->lookup(l.table, run.y + row, 1, panel.columns, w.outputs);
      } else {
        w.kernels->lookup(l.table, run.y + row, g.rows, panel.columns, w.outputs);
        break;
      }
    }
  }
}

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

// Lines [begin, end) of all images.
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

// Row at which a cut of the work falls, on the border of a tile; the same for both sides.
int64_t cut(int64_t position, int64_t start, int64_t units, int64_t rows, int64_t tile) {
  if (position <= start) return 0;
  const int64_t row = (position - start) / units / tile * tile;
  return std::min(row, rows);
}

void run_part(const Run& run, int64_t part) {
  const ConvLayer& l = run.layer;
  const PackedWeights& w = *l.weights;
  const int64_t begin = l.work * part / run.parts, end = l.work * (part + 1) / run.parts;
  int8_t* slot = run.slots + part * l.slot_bytes();
  auto** pointers = reinterpret_cast<const uint8_t**>(slot);
  auto* rows = reinterpret_cast<int32_t*>(slot + l.block_pointers * 8);
  auto* raw = reinterpret_cast<int32_t*>(slot + l.block_pointers * 8 + (l.block_rows * 4 + 63) / 64 * 64);
  if (l.lines) return run_lines(run, begin, end, pointers);
  for (const Block& block : l.blocks) {
    const int64_t block_end = block.start + block.rows * l.units;
    if (block_end <= begin || block.start >= end) continue;
    fill_pointers(run, block, pointers);
    const bool scattered = !l.phases[static_cast<size_t>(block.phase)].pixels.empty();
    if (scattered) fill_rows(run, block, rows);
    // a position past the block leaves the last row to this part
    const auto rows_between = [&](int64_t start, int64_t units, int64_t tile, auto&& call) {
      const int64_t stop = start + block.rows * units;
      if (stop <= begin || start >= end) return;
      const int64_t from = cut(begin, start, units, block.rows, tile);
      const int64_t to = end >= stop ? block.rows : cut(end, start, units, block.rows, tile);
      if (from < to) call(from, to);
    };
    if (w.method == Method::depthwise) {
      rows_between(block.start, 1, 1, [&](int64_t from, int64_t to) {
        run_depthwise(run, block, from, to, pointers, raw);
      });
      continue;
    }
    const auto panel_rows = [&](const Panel& panel, auto&& call) {
      const int64_t start = block.start + panel.padded / unit_columns * block.rows;
      rows_between(start, panel.units, w.kernels->rows[panel.units - 1], call);
    };
    // a phase of a transposed convolution may have no tap, and so no pointers
    if (l.words == Words::by_block && !l.phases[static_cast<size_t>(block.phase)].taps.empty()) {
      int64_t first = block.rows, last = 0;
      for (const Panel& panel : w.panels) {
        panel_rows(panel, [&](int64_t from, int64_t to) {
          first = std::min(first, from);
          last = std::max(last, to);
        });
      }
      widen_rows(run, first, last, pointers, slot + l.slot_bytes() - l.block_word_bytes());
    }
    for (const Panel& panel : w.panels) {
      panel_rows(panel, [&](int64_t from, int64_t to) {
        run_panel(run, block, panel, from, to, pointers, scattered ? rows : nullptr, raw);
      });
    }
  }
}

// Rows of the activation with their padding, so that a row of the kernel is one stretch of memory.
void fold_rows(const ConvLayer& l, const uint8_t* x, uint8_t* to, int64_t begin, int64_t end) {
  const ConvShape& s = l.shape;
  const int64_t c = l.weights->inputs;
  const auto zero = static_cast<uint8_t>(l.x_grid.zero_point);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* from = x + row * s.in_w * c;
    uint8_t* out = to + row * l.row_bytes;
    if (s.dilation_w == 1) {
      const int64_t width = l.row_bytes / c;
      const int64_t left = std::min<int64_t>(s.pad_left, width);
      const int64_t inside = std::max<int64_t>(std::min<int64_t>(s.in_w, width - left), 0);
      std::memset(out, zero, static_cast<size_t>(left * c));
      std::memcpy(out + left * c, from, static_cast<size_t>(inside * c));
      std::memset(out + (left + inside) * c, zero, static_cast<size_t>((width - left - inside) * c));
      continue;
    }
    for (int32_t ox = 0; ox < s.out_w; ++ox) {
      for (int32_t k = 0; k < l.weights->kernel_w; ++k, out += c) {
        const int32_t ix = source(ox, k, s.stride_w, s.pad_left, s.dilation_w, s.in_w, false);
        if (ix < 0) {
          std::memset(out, zero, static_cast<size_t>(c));
        } else {
          std::memcpy(out, from + ix * c, static_cast<size_t>(c));
        }
      }
    }
  }
}

}  // namespace

std::shared_ptr<const ConvLayer> prepare_conv(std::shared_ptr<const PackedWeights> weights, const ConvShape& shape, Type x,
                                        const Grid& x_grid, Type y, const Epilogue& epilogue) {
  auto layer = std::make_shared<ConvLayer>();
  ConvLayer& l = *layer;
  l.weights = std::move(weights);
  const PackedWeights& w = *l.weights;
  l.shape = shape;
  l.x = x;
  l.y = y;
  l.x_grid = x_grid;
  l.epilogue = epilogue;
  if (w.method == Method::wide) return layer;

  l.bytes = has_byte_epilogue(epilogue, y) && !(w.method == Method::depthwise && epilogue.add);
  l.left_flip = (x == Type::s8) == w.kernels->signed_left ? 0 : 0x80;
  if (l.bytes) fill_multipliers(l);
  if (epilogue.table != nullptr) {
    std::memset(l.table, 0, sizeof l.table);
    std::memcpy(l.table, epilogue.table, static_cast<size_t>(epilogue.y.qmax - epilogue.y.qmin + 1));
    l.epilogue.table = l.table;
  }
  if (l.bytes) {
    l.winograd = Winograd::prepare(w, shape, x, x_grid, l.epilogue, l.byte_epilogue, l.multiplier.data(), l.epilogue.table);
    if (l.winograd != nullptr) return layer;
  }
  const bool folded = w.method == Method::folded;
  l.pointwise = w.method == Method::gemm && w.taps == 1 && !shape.transposed && shape.stride_h == 1 &&
                shape.stride_w == 1 && shape.pad_top == 0 && shape.pad_left == 0 && shape.in_h == shape.out_h &&
                shape.in_w == shape.out_w;
  l.lines = w.method == Method::depthwise && l.bytes && w.kernel_h == 3 && w.kernel_w == 3 && shape.dilation_w == 1 &&
            shape.stride_w <= 2 && shape.out_h > 0 && shape.out_w > 0;
  l.row_bytes = int64_t{shape.in_w} * w.inputs;
  if (folded) {
    l.row_bytes = shape.dilation_w == 1
                      ? (int64_t{shape.out_w - 1} * shape.stride_w + w.kernel_w) * w.inputs
                      : int64_t{shape.out_w} * w.depth;
  }
  l.image_bytes = l.row_bytes * shape.in_h;
  l.folded_bytes = folded ? (shape.batch * l.image_bytes + 127) / 64 * 64 : 0;
  const bool reads_words = w.kernels->widen != nullptr && w.method != Method::depthwise;
  l.words = !reads_words ? Words::never : w.taps > 1 ? Words::ahead : Words::by_block;
  const int64_t word_count = l.words == Words::ahead ? shape.batch * l.image_bytes : int64_t{w.inputs};
  // the rows of one stretch of memory become words in one
  l.word_bytes = !reads_words ? 0 : l.pointwise ? word_count * 2 : (word_count * 2 + 127) / 64 * 64;
  fill_zero_row(l);
  for (int32_t h = 0; h < (shape.transposed ? shape.stride_h : 1); ++h) {
    for (int32_t v = 0; v < (shape.transposed ? shape.stride_w : 1); ++v) add_phase(l, h, v);
  }
  split_blocks(l);
  return layer;
}

int64_t conv_scratch(const ConvLayer& layer, int32_t threads) {
  if (layer.weights->method == Method::wide) return 0;
  if (layer.winograd != nullptr) return layer.winograd->scratch(threads);
  const int64_t words = layer.words == Words::ahead ? layer.word_bytes : 0;
  return layer.folded_bytes + words + layer.slot_bytes() * threads;
}

void run_conv(const ConvLayer& layer, const Threads& threads, const void* x, void* y, const void* residual,
              void* scratch) {
  if (layer.weights->method == Method::wide) {
    const WideConv wide{*layer.weights, layer.shape, layer.x, layer.x_grid, layer.y, layer.epilogue};
    return run_wide_conv(wide, threads, x, y, residual);
  }
  if (layer.winograd != nullptr) {
    return layer.winograd->run(threads, static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y),
                               static_cast<const uint8_t*>(residual), scratch);
  }
  auto* bytes = static_cast<uint8_t*>(scratch);
  const auto* left = static_cast<const uint8_t*>(x);
  const ConvShape& s = layer.shape;
  const int64_t products =
      s.batch * s.out_h * s.out_w * layer.weights->outputs * layer.weights->taps * layer.weights->depth;
  const int64_t parts = products < serial_products ? 1 : threads.count;
  if (layer.weights->method == Method::folded) {
    const int64_t rows = layer.shape.batch * layer.shape.in_h;
    run_parts(threads, parts, [&](int64_t part) {
      fold_rows(layer, left, bytes, rows * part / parts, rows * (part + 1) / parts);
    });
    left = bytes;
    bytes += layer.folded_bytes;
  }
  if (layer.words == Words::ahead) {
    // in whole vectors, so that no part writes into another's
    const int64_t vectors = (s.batch * layer.image_bytes + 15) / 16;
    auto* words = reinterpret_cast<int16_t*>(bytes);
    run_parts(threads, parts, [&](int64_t part) {
      const int64_t begin = vectors * part / parts * 16, end = vectors * (part + 1) / parts * 16;
      layer.weights->kernels->widen(left + begin, layer.left_flip, end - begin, words + begin);
    });
    left = bytes;
    bytes += layer.word_bytes;
  }
  const Run run{layer,
                threads,
                left,
                layer.words == Words::ahead ? 2 : 1,
                static_cast<uint8_t*>(y),
                static_cast<const uint8_t*>(residual),
                reinterpret_cast<int8_t*>(bytes),
                parts};
  run_parts(threads, parts, [&](int64_t part) { run_part(run, part); });
}

}  // namespace qat
