#include "conv.h"

#include <algorithm>
#include <cstring>

#include "conv_layer.h"
#include "parts.h"
#include "requantize.h"
#include "wide.h"

namespace qat {
namespace {

// What a block of rows may take: the pointers, and the activations that stay in the second-level cache for all panels.
constexpr int64_t max_pointers = 8192;
constexpr int64_t max_left_bytes = 256 * 1024;
// Less work than this is not worth a second thread.
constexpr int64_t serial_products = 200 * 1000;

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
