#include "quantize.h"

#include <algorithm>
#include <cstring>

#include "byte_table.h"
#include "copy.h"
#include "loops.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;
constexpr int64_t tile_rows = 64;

// Whether the last but one dimension is the one that x stores densely: (N, C, H, W) to (N, H, W, C) and back.
bool is_transposition(const Nest& nest) {
  return nest.rank >= 2 && nest.strides[0][nest.rank - 2] == 1 && nest.strides[1][nest.rank - 1] == 1;
}

// Calls block(x offset, y offset, size of the dimension x stores densely) for blocks of at most `columns` of it.
template <class Block>
void for_blocks(const Threads& threads, const Nest& nest, int64_t columns, const Block& block) {
  const int32_t dense = nest.rank - 2;
  const int64_t size = nest.sizes[dense], blocks = (size + columns - 1) / columns;
  const int64_t work = nest.sizes[nest.rank - 1] * std::min(size, columns);
  parallel(threads, nest.count(dense) * blocks, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Position at(nest, dense, i / blocks);
      const int64_t start = i % blocks * columns;
      block(at.offsets[0] + start, at.offsets[1] + start * nest.strides[1][dense], std::min(columns, size - start));
    }
  });
}

template <class Element>
void gather(const Element* from, int64_t stride, int64_t n, Element* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
}

}  // namespace

void quantize(const char* isa, const Threads& threads, const View& x, const View& y, const int64_t* perm) {
  const Loops& loops = find_loops(isa);
  const Nest nest = permuted(x, y, perm);
  const auto* from = static_cast<const float*>(x.data);
  const int64_t width = width_of(y.type);
  if (nest.rank == 0 || (nest.rank == 1 && nest.strides[0][0] == 1)) {
    parallel(threads, y.count(), 1, [&](int64_t begin, int64_t end) {
      loops.quantize(y.type, y.grid, from + begin, end - begin, at(y.data, y.type, begin));
    });
    return;
  }
  const int32_t inner = nest.rank - 1;
  const int64_t n = nest.sizes[inner], stride = nest.strides[0][inner];
  if (is_transposition(nest)) {
    for_blocks(threads, nest, tile, [&](int64_t x_at, int64_t y_at, int64_t columns) {
      uint16_t codes[tile_rows * tile];
      for (int64_t row = 0; row < n; row += tile_rows) {
        const int64_t rows = std::min(tile_rows, n - row);
        for (int64_t r = 0; r < rows; ++r) {
          loops.quantize(y.type, y.grid, from + x_at + (row + r) * stride, columns, at(codes, y.type, r * tile));
        }
        transpose_block(width, codes, tile, at(y.data, y.type, y_at + row), nest.strides[1][inner - 1], rows, columns);
      }
    });
    return;
  }
  parallel(threads, nest.count(inner), n, [&](int64_t begin, int64_t end) {
    Position position(nest, inner, begin);
    for (int64_t i = begin; i < end; ++i, position.next()) {
      for (int64_t start = 0; start < n; start += tile) {
        const int64_t size = std::min(tile, n - start);
        float real[tile];
        gather(from + position.offsets[0] + start * stride, stride, size, real);
        loops.quantize(y.type, y.grid, real, size, at(y.data, y.type, position.offsets[1] + start));
      }
    }
  });
}

void dequantize(const char* isa, const Threads& threads, const View& x, const View& y, const int64_t* perm) {
  const Loops& loops = find_loops(isa);
  const Nest nest = permuted(x, y, perm);
  auto* to = static_cast<float*>(y.data);
  const int64_t width = width_of(x.type);
  if (nest.rank == 0 || (nest.rank == 1 && nest.strides[0][0] == 1)) {
    parallel(threads, y.count(), 1, [&](int64_t begin, int64_t end) {
      loops.dequantize(x.type, x.grid, at(x.data, x.type, begin), end - begin, to + begin);
    });
    return;
  }
  const int32_t inner = nest.rank - 1;
  const int64_t n = nest.sizes[inner], stride = nest.strides[0][inner];
  if (is_transposition(nest)) {
    for_blocks(threads, nest, tile_rows, [&](int64_t x_at, int64_t y_at, int64_t columns) {
      uint16_t codes[tile_rows * tile];
      for (int64_t row = 0; row < n; row += tile) {
        const int64_t rows = std::min(tile, n - row);
        transpose_block(width, at(x.data, x.type, x_at + row * stride), stride, codes, tile, rows, columns);
        for (int64_t c = 0; c < columns; ++c) {
          loops.dequantize(x.type, x.grid, at(codes, x.type, c * tile), rows,
                           to + y_at + row + c * nest.strides[1][inner - 1]);
        }
      }
    });
    return;
  }
  parallel(threads, nest.count(inner), n, [&](int64_t begin, int64_t end) {
    Position position(nest, inner, begin);
    for (int64_t i = begin; i < end; ++i, position.next()) {
      for (int64_t start = 0; start < n; start += tile) {
        const int64_t size = std::min(tile, n - start);
        uint16_t codes[tile];
        const void* source = at(x.data, x.type, position.offsets[0] + start * stride);
        if (width == 1) {
          gather(static_cast<const uint8_t*>(source), stride, size, reinterpret_cast<uint8_t*>(codes));
        } else {
          gather(static_cast<const uint16_t*>(source), stride, size, codes);
        }
        loops.dequantize(x.type, x.grid, codes, size, to + position.offsets[1] + start);
      }
    }
  });
}

void requantize_run(const Loops& loops, const View& x, const View& y, const ByteTable* table, const void* from,
                    int64_t n, void* to) {
  if (table != nullptr) {
    loops.lookup(table->codes, static_cast<const uint8_t*>(from), n, static_cast<uint8_t*>(to));
    return;
  }
  for (int64_t start = 0; start < n; start += tile) {
    const int64_t size = std::min(tile, n - start);
    float real[tile];
    loops.dequantize(x.type, x.grid, at(from, x.type, start), size, real);
    loops.quantize(y.type, y.grid, real, size, at(to, y.type, start));
  }
}

bool requantize_table(const Loops& loops, const View& x, const View& y, int64_t count, ByteTable* table) {
  if (width_of(x.type) != 1 || width_of(y.type) != 1 || count < 2 * byte_codes) return false;
  uint8_t bytes[byte_codes];
  for (int32_t i = 0; i < byte_codes; ++i) bytes[i] = static_cast<uint8_t>(i);
  requantize_run(loops, x, y, nullptr, bytes, byte_codes, table->codes);
  return true;
}

void requantize(const char* isa, const Threads& threads, const View& x, const View& y) {
  const int64_t count = y.count();
  if (same_codes(x, y)) {
    if (x.data != y.data) std::memcpy(y.data, x.data, static_cast<size_t>(count * width_of(x.type)));
    return;
  }
  const Loops& loops = find_loops(isa);
  ByteTable table;
  const ByteTable* const codes = requantize_table(loops, x, y, count, &table) ? &table : nullptr;
  parallel(threads, count, 1, [&](int64_t begin, int64_t end) {
    requantize_run(loops, x, y, codes, at(x.data, x.type, begin), end - begin, at(y.data, y.type, begin));
  });
}

}  // namespace qat
