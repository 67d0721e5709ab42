#include "layout.h"

#include <algorithm>
#include <cstring>

#include "byte_table.h"
#include "copy.h"
#include "parallel.h"

namespace qat {
namespace {

template <class Element>
void fill(void* data, int64_t n, int32_t value) {
  auto* to = static_cast<Element*>(data);
  std::fill(to, to + n, static_cast<Element>(value));
}

void fill_typed(Type type, void* data, int64_t n, int32_t value) {
  if (width_of(type) == 1) return fill<uint8_t>(data, n, value);
  if (width_of(type) == 2) return fill<uint16_t>(data, n, value);
  fill<uint32_t>(data, n, value);
}

// Where index `index` of the padded dimension comes from; -1 for a constant.
int64_t source_of(int64_t index, int64_t begin, int64_t size, PadMode mode) {
  const int64_t source = index - begin;
  if (source >= 0 && source < size) return source;
  if (mode == PadMode::constant) return -1;
  if (mode == PadMode::replicate) return source < 0 ? 0 : size - 1;
  return source < 0 ? -source : 2 * (size - 1) - source;
}

// The dimensions with padding, and `inner` elements that lie side by side without any.
struct Padded {
  int32_t rank = 0;
  int64_t sizes[max_rank], out_sizes[max_rank], begins[max_rank];
  int64_t inner = 1;

  Padded(const View& x, const int64_t* pads, const View& y) {
    int32_t last = x.rank;
    while (last > 0 && pads[2 * last - 2] == 0 && pads[2 * last - 1] == 0) inner *= x.sizes[--last];
    rank = last;
    for (int32_t d = 0; d < rank; ++d) {
      sizes[d] = x.sizes[d];
      out_sizes[d] = y.sizes[d];
      begins[d] = pads[2 * d];
    }
  }
};

}  // namespace

void pad(const char*, const Threads& threads, const View& x, const int64_t* pads, PadMode mode, int32_t value,
         const View& y) {
  const Padded p(x, pads, y);
  const int64_t width = width_of(x.type);
  if (p.rank == 0) {
    parallel(threads, y.count(), 1, [&](int64_t begin, int64_t end) {
      std::memcpy(at(y.data, y.type, begin), at(x.data, x.type, begin), static_cast<size_t>((end - begin) * width));
    });
    return;
  }
  // rows along the last dimension with padding; what is between the pads is copied at once
  const int32_t last = p.rank - 1;
  const int64_t row_size = p.out_sizes[last] * p.inner, row_from = p.sizes[last] * p.inner;
  if (row_size == 0) return;
  parallel(threads, y.count() / row_size, row_size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      void* const to = at(y.data, y.type, row * row_size);
      int64_t source = 0, stride = 1, rest = row;
      bool outside = false;
      for (int32_t d = last - 1; d >= 0; --d) {
        const int64_t i = source_of(rest % p.out_sizes[d], p.begins[d], p.sizes[d], mode);
        rest /= p.out_sizes[d];
        outside = outside || i < 0;
        source += i * stride;
        stride *= p.sizes[d];
      }
      if (outside) {
        fill_typed(y.type, to, row_size, value);
        continue;
      }
      const void* const from = at(x.data, x.type, source * row_from);
      const int64_t before = p.begins[last], size = p.sizes[last];
      std::memcpy(at(to, y.type, before * p.inner), from, static_cast<size_t>(row_from * width));
      const auto border = [&](int64_t first, int64_t limit) {
        if (mode == PadMode::constant) {
          fill_typed(y.type, at(to, y.type, first * p.inner), (limit - first) * p.inner, value);
          return;
        }
        for (int64_t i = first; i < limit; ++i) {
          std::memcpy(at(to, y.type, i * p.inner), at(from, x.type, source_of(i, before, size, mode) * p.inner),
                      static_cast<size_t>(p.inner * width));
        }
      };
      border(0, before);
      border(before + size, p.out_sizes[last]);
    }
  });
}

void concat(const char* isa, const Threads& threads, const View* xs, int32_t count, int32_t axis, const View& y) {
  const Loops& loops = find_loops(isa);
  int64_t outer = 1, inner = 1;
  for (int32_t d = 0; d < axis; ++d) outer *= y.sizes[d];
  for (int32_t d = axis + 1; d < y.rank; ++d) inner *= y.sizes[d];
  const int64_t stride = y.sizes[axis] * inner;
  int64_t first = 0;
  for (int32_t k = 0; k < count; ++k) {
    const View& x = xs[k];
    const int64_t length = x.sizes[axis] * inner;
    const int64_t start = first;
    first += length;
    if (length == 0) continue;
    if (same_codes(x, y) || x.type == Type::f32) {
      Nest nest;
      nest.operands = 2;
      const int64_t rows[] = {length, stride}, elements[] = {1, 1};
      nest.push(outer, rows);
      nest.push(length, elements);
      copy_nest(threads, width_of(x.type), nest, x.data, at(y.data, y.type, start));
      continue;
    }
    ByteTable table;
    const ByteTable* const codes = requantize_table(loops, x, y, outer * length, &table) ? &table : nullptr;
    // long rows in pieces, so that one of them has work for several threads
    constexpr int64_t longest = 8192;
    const int64_t pieces = (length + longest - 1) / longest;
    parallel(threads, outer * pieces, std::min(length, longest), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / pieces, piece = i % pieces * longest;
        requantize_run(loops, x, y, codes, at(x.data, x.type, row * length + piece), std::min(longest, length - piece),
                       at(y.data, y.type, row * stride + start + piece));
      }
    });
  }
}

void transpose(const char*, const Threads& threads, const View& x, const int64_t* perm, const View& y) {
  copy_nest(threads, width_of(x.type), permuted(x, y, perm), x.data, y.data);
}

void slice(const char*, const Threads& threads, const View& x, const int64_t* starts, const int64_t* steps,
           const View& y) {
  int64_t from[max_rank], to[max_rank], offset = 0;
  dense_strides(x, from);
  dense_strides(y, to);
  Nest nest;
  nest.operands = 2;
  for (int32_t d = 0; d < y.rank; ++d) {
    offset += starts[d] * from[d];
    const int64_t each[] = {steps[d] * from[d], to[d]};
    nest.push(y.sizes[d], each);
  }
  if (y.count() == 0) return;
  copy_nest(threads, width_of(x.type), nest, at(x.data, x.type, offset), y.data);
}

void expand(const char*, const Threads& threads, const View& x, const View& y) {
  Nest nest = broadcast(x, x, y);
  // operand 1 of a copy is what it writes
  std::copy(nest.strides[2], nest.strides[2] + nest.rank, nest.strides[1]);
  nest.operands = 2;
  copy_nest(threads, width_of(x.type), nest, x.data, y.data);
}

void roll(const char*, const Threads& threads, const View& x, const int64_t* shifts, const View& y) {
  if (y.count() == 0) return;
  int64_t strides[max_rank], shift[max_rank];
  dense_strides(x, strides);
  int32_t corners = 1;
  for (int32_t d = 0; d < x.rank; ++d) {
    shift[d] = (shifts[d] % x.sizes[d] + x.sizes[d]) % x.sizes[d];
    corners *= 2;
  }
  // each part moves as a whole: along every dimension what wraps around, and what does not
  for (int32_t corner = 0; corner < corners; ++corner) {
    Nest nest;
    nest.operands = 2;
    int64_t from = 0, to = 0;
    bool empty = false;
    for (int32_t d = 0; d < x.rank; ++d) {
      const bool wraps = (corner >> d & 1) != 0;
      const int64_t size = wraps ? shift[d] : x.sizes[d] - shift[d];
      from += wraps ? (x.sizes[d] - shift[d]) * strides[d] : 0;
      to += wraps ? 0 : shift[d] * strides[d];
      empty = empty || size == 0;
      const int64_t each[] = {strides[d], strides[d]};
      nest.push(size, each);
    }
    if (!empty) copy_nest(threads, width_of(x.type), nest, at(x.data, x.type, from), at(y.data, y.type, to));
  }
}

}  // namespace qat
