#include "copy.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace qat {
namespace {

template <class Element>
void transpose_elements(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                        int64_t columns) {
  constexpr int64_t block = 16;
  const auto* x = static_cast<const Element*>(from);
  auto* y = static_cast<Element*>(to);
  for (int64_t r = 0; r < rows; r += block) {
    const int64_t r_end = std::min(rows, r + block);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = r; i < r_end; ++i) y[c * to_stride + i] = x[i * from_stride + c];
    }
  }
}

// Few rows, images of three colours say: one pass that writes a whole element of all rows.
template <class Element, int Rows>
void interleave(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t columns) {
  const auto* x = static_cast<const Element*>(from);
  auto* y = static_cast<Element*>(to);
  if (to_stride == Rows) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int r = 0; r < Rows; ++r) y[c * Rows + r] = x[r * from_stride + c];
    }
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      for (int r = 0; r < Rows; ++r) y[c * to_stride + r] = x[r * from_stride + c];
    }
  }
}

template <class Element>
void transpose_typed(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
  switch (rows) {
    case 2: return interleave<Element, 2>(from, from_stride, to, to_stride, columns);
    case 3: return interleave<Element, 3>(from, from_stride, to, to_stride, columns);
    case 4: return interleave<Element, 4>(from, from_stride, to, to_stride, columns);
    default: return transpose_elements<Element>(from, from_stride, to, to_stride, rows, columns);
  }
}

template <class Element>
void copy_run(const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

template <class Element>
void copy_typed(const Threads& threads, const Nest& nest, const void* from, void* to) {
  const auto* x = static_cast<const Element*>(from);
  auto* y = static_cast<Element*>(to);
  if (nest.rank == 0) {
    *y = *x;
    return;
  }
  const int32_t inner = nest.rank - 1;
  const int64_t n = nest.sizes[inner], from_stride = nest.strides[0][inner], to_stride = nest.strides[1][inner];
  const bool rows = from_stride == 1 && to_stride == 1;
  if (nest.rank == 1 && rows) {
    parallel(threads, n, 1, [&](int64_t begin, int64_t end) {
      std::memcpy(y + begin, x + begin, static_cast<size_t>(end - begin) * sizeof(Element));
    });
    return;
  }
  // the dimension that x stores densely, if the innermost is not the one: it is worked on in blocks with the innermost
  int32_t dense = -1;
  for (int32_t d = 0; d < inner && !rows; ++d) {
    if (nest.strides[0][d] == 1) dense = d;
  }
  if (dense >= 0) {
    constexpr int64_t block = 64;
    Nest outer = nest;
    outer.rank = inner - 1;
    for (int32_t d = dense; d < inner - 1; ++d) {
      outer.sizes[d] = nest.sizes[d + 1];
      for (int32_t k = 0; k < 2; ++k) outer.strides[k][d] = nest.strides[k][d + 1];
    }
    const int64_t size = nest.sizes[dense], stride = nest.strides[1][dense], blocks = (size + block - 1) / block;
    if (to_stride == 1) {
      parallel(threads, outer.count(outer.rank) * blocks, n * std::min(size, block), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Position at(outer, outer.rank, i / blocks);
          const int64_t start = i % blocks * block;
          transpose_typed<Element>(x + at.offsets[0] + start, from_stride, y + at.offsets[1] + start * stride, stride,
                                   n, std::min(block, size - start));
        }
      });
      return;
    }
  }
  const int64_t count = nest.count(inner);
  parallel(threads, count, n, [&](int64_t begin, int64_t end) {
    Position at(nest, inner, begin);
    for (int64_t i = begin; i < end; ++i, at.next()) {
      if (rows) {
        std::memcpy(y + at.offsets[1], x + at.offsets[0], static_cast<size_t>(n) * sizeof(Element));
      } else {
        copy_run(x + at.offsets[0], from_stride, y + at.offsets[1], to_stride, n);
      }
    }
  });
}

}  // namespace

void transpose_block(int64_t width, const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
  if (width == 1) return transpose_typed<uint8_t>(from, from_stride, to, to_stride, rows, columns);
  if (width == 2) return transpose_typed<uint16_t>(from, from_stride, to, to_stride, rows, columns);
  transpose_typed<uint32_t>(from, from_stride, to, to_stride, rows, columns);
}

void copy_nest(const Threads& threads, int64_t width, const Nest& nest, const void* from, void* to) {
  if (width == 1) return copy_typed<uint8_t>(threads, nest, from, to);
  if (width == 2) return copy_typed<uint16_t>(threads, nest, from, to);
  copy_typed<uint32_t>(threads, nest, from, to);
}

}  // namespace qat
