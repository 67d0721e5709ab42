#include <algorithm>

#include "conv_layer.h"
#include "requantize.h"

namespace qat {
namespace {

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

// Row at which a cut of the work falls, on the border of a tile; the same for both sides.
int64_t cut(int64_t position, int64_t start, int64_t units, int64_t rows, int64_t tile) {
  if (position <= start) return 0;
  const int64_t row = (position - start) / units / tile * tile;
  return std::min(row, rows);
}

}  // namespace

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

}  // namespace qat
