#include "elementwise.h"

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "nest.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;

// One operand of a row in float32.
void fetch(const Loops& loops, const View& view, const void* row, int32_t step, int64_t start, int64_t n, float* real) {
  if (step != 0) return loops.dequantize(view.type, view.grid, at(row, view.type, start), n, real);
  loops.dequantize(view.type, view.grid, row, 1, real);
  std::fill(real + 1, real + n, real[0]);
}

// Between DequantizeLinear and QuantizeLinear.
void in_float(const Loops& loops, Arithmetic op, const View& a, const View& b, const View& y, const BinaryRows& r) {
  for (int64_t row = 0; row < r.rows; ++row) {
    const void* left = at(r.a, a.type, row * r.a_stride);
    const void* right = at(r.b, b.type, row * r.b_stride);
    for (int64_t start = 0; start < r.columns; start += tile) {
      const int64_t n = std::min(tile, r.columns - start);
      float real_a[tile], real_b[tile];
      fetch(loops, a, left, r.a_step, start, n, real_a);
      fetch(loops, b, right, r.b_step, start, n, real_b);
      loops.combine(op, real_b, n, real_a);
      loops.quantize(y.type, y.grid, real_a, n, at(r.y, y.type, row * r.y_stride + start));
    }
  }
}

// Calls rows(BinaryRows) for parts of the broadcast operands.
template <class Function>
void for_rows(const Threads& threads, const View& a, const View& b, const View& y, const Function& function) {
  constexpr int64_t longest = 8192;
  const Nest nest = broadcast(a, b, y);
  const int32_t inner = std::max(nest.rank - 1, 0);
  const int64_t n = nest.rank > 0 ? nest.sizes[inner] : 1;
  BinaryRows whole{};
  whole.a_step = nest.rank > 0 ? static_cast<int32_t>(nest.strides[0][inner]) : 1;
  whole.b_step = nest.rank > 0 ? static_cast<int32_t>(nest.strides[1][inner]) : 1;
  const auto part = [&](int64_t a_at, int64_t b_at, int64_t y_at, int64_t rows, int64_t columns) {
    BinaryRows r = whole;
    r.a = at(a.data, a.type, a_at);
    r.b = at(b.data, b.type, b_at);
    r.y = at(y.data, y.type, y_at);
    r.rows = rows;
    r.columns = columns;
    function(r);
  };
  if (n > longest || inner == 0) {
    const int64_t blocks = (n + longest - 1) / longest;
    parallel(threads, nest.count(inner) * blocks, std::min(n, longest), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Position position(nest, inner, i / blocks);
        const int64_t start = i % blocks * longest;
        part(position.offsets[0] + start * whole.a_step, position.offsets[1] + start * whole.b_step,
             position.offsets[2] + start, 1, std::min(longest, n - start));
      }
    });
    return;
  }
  const int32_t second = inner - 1;
  const int64_t rows = nest.sizes[second];
  whole.a_stride = nest.strides[0][second];
  whole.b_stride = nest.strides[1][second];
  whole.y_stride = nest.strides[2][second];
  parallel(threads, nest.count(inner), n, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t some = std::min(end - begin, rows - begin % rows);
      const Position position(nest, inner, begin);
      part(position.offsets[0], position.offsets[1], position.offsets[2], some, n);
      begin += some;
    }
  });
}

bool any_wide(const View& a, const View& b, const View& y) {
  return a.grid.wide || b.grid.wide || y.grid.wide || width_of(a.type) != 1 || width_of(b.type) != 1 ||
         width_of(y.type) != 1;
}

// Rows of few columns that all meet the same row of the other operand, as channels with a factor each: that row is
// repeated, so that several rows are one. Calls function(BinaryRows).
template <class Function>
void join_rows(const View& a, const View& b, const View& y, const BinaryRows& r, const Function& function) {
  constexpr int64_t few = 128, most = 1024;
  const bool repeats_a = r.a_stride == 0 && r.a_step == 1 && r.b_stride == r.columns;
  const bool repeats_b = r.b_stride == 0 && r.b_step == 1 && r.a_stride == r.columns;
  if (r.columns > few || r.rows < 2 || r.y_stride != r.columns || (!repeats_a && !repeats_b)) return function(r);
  const int64_t width = width_of(repeats_a ? a.type : b.type), bytes = r.columns * width;
  const int64_t times = std::min(r.rows, most / r.columns);
  uint16_t repeated[most];
  for (int64_t i = 0; i < times; ++i) {
    std::memcpy(reinterpret_cast<char*>(repeated) + i * bytes, repeats_a ? r.a : r.b, static_cast<size_t>(bytes));
  }
  BinaryRows joined = r;
  joined.a_step = joined.b_step = 1;
  joined.rows = 1;
  for (int64_t row = 0; row < r.rows; row += times) {
    joined.columns = std::min(times, r.rows - row) * r.columns;
    joined.a = repeats_a ? repeated : at(r.a, a.type, row * r.columns);
    joined.b = repeats_a ? at(r.b, b.type, row * r.columns) : repeated;
    joined.y = at(r.y, y.type, row * r.columns);
    function(joined);
  }
}

using Loop8 = void (*)(const Type types[3], const Grid grids[3], const BinaryRows& rows);

// `loop` is of 8-bit operands that are not `wide`, or null where the runtime has none.
void binary(const Loops& loops, const Threads& threads, Arithmetic op, Loop8 loop, const View& a, const View& b,
            const View& y) {
  const Type types[] = {a.type, b.type, y.type};
  const Grid grids[] = {a.grid, b.grid, y.grid};
  const bool direct = loop != nullptr && !any_wide(a, b, y);
  for_rows(threads, a, b, y, [&](const BinaryRows& rows) {
    join_rows(a, b, y, rows, [&](const BinaryRows& joined) {
      if (direct) {
        loop(types, grids, joined);
      } else {
        in_float(loops, op, a, b, y, joined);
      }
    });
  });
}

}  // namespace

void add(const char* isa, const Threads& threads, const View& a, const View& b, const View& y) {
  const Loops& loops = find_loops(isa);
  binary(loops, threads, Arithmetic::add, loops.add, a, b, y);
}

void sub(const char* isa, const Threads& threads, const View& a, const View& b, const View& y) {
  binary(find_loops(isa), threads, Arithmetic::sub, nullptr, a, b, y);
}

void mul(const char* isa, const Threads& threads, const View& a, const View& b, const View& y) {
  const Loops& loops = find_loops(isa);
  binary(loops, threads, Arithmetic::mul, loops.mul, a, b, y);
}

void div(const char* isa, const Threads& threads, const View& a, const View& b, const View& y) {
  binary(find_loops(isa), threads, Arithmetic::div, nullptr, a, b, y);
}

}  // namespace qat
