#include "check.h"

#include <algorithm>
#include <cmath>

#include "../kernels/integer/parallel.h"

namespace qat {
namespace {

bool is_finite_positive(float v) { return std::isfinite(v) && v > 0.0f; }

struct Range {
  int32_t low, high;
};

Range range_of(Type type) {
  switch (type) {
    case Type::u8: return {0, 255};
    case Type::s8: return {-128, 127};
    case Type::u16: return {0, 65535};
    default: return {-32768, 32767};
  }
}

int64_t codes_of(const Grid& grid) { return int64_t{grid.qmax} - grid.qmin + 1; }

void check_elementwise(const Checker& c) {
  c.expect(2, 2, 0, 0);
  c.codes(c.x(0), "a");
  c.codes(c.x(1), "b");
  c.codes(c.y, "y");
  c.require(c.y.rank == std::max(c.x(0).rank, c.x(1).rank), "y does not have the rank of the operands");
  c.broadcasts(c.x(0), 0);
  c.broadcasts(c.x(1), 0);
  for (int32_t d = 0; d < c.y.rank; ++d) {
    const auto size = [&](const View& v) { return d < c.y.rank - v.rank ? 1 : v.sizes[d - (c.y.rank - v.rank)]; };
    c.require(c.y.sizes[d] == std::max(size(c.x(0)), size(c.x(1))), "y does not have the sizes of the operands");
  }
}

void check_quantize(const Checker& c) {
  c.expect(1, 1, static_cast<size_t>(c.y.rank), 0);
  const bool forward = c.op.kind == Kind::quantize;
  c.require((forward ? c.x(0) : c.y).type == Type::f32, "the real values are not f32");
  c.codes(forward ? c.y : c.x(0), "codes");
  c.permutation(0);
}

void check_softmax(const Checker& c) {
  c.expect(1, 1, 1, 0);
  c.codes(c.x(0), "x");
  c.codes(c.y, "y");
  c.same_sizes(c.x(0));
  c.integer(0, 0, c.y.rank - 1, "axis");
  const bool wide = c.x(0).grid.wide || c.y.grid.wide || width_of(c.x(0).type) != 1;
  c.require(wide || width_of(c.y.type) == 1, "y of more than 8 bits has a grid that is not wide");
}

void check_layer_norm(const Checker& c) {
  c.expect(3, 1, 1, 1);
  c.codes(c.x(0), "x");
  c.codes(c.y, "y");
  c.same_sizes(c.x(0));
  const int64_t axes = c.integer(0, 1, c.y.rank, "number of axes");
  int64_t length = 1;
  for (int32_t d = c.y.rank - static_cast<int32_t>(axes); d < c.y.rank; ++d) length *= c.y.sizes[d];
  if (c.has(1)) c.constant(1, Type::f32, length, "weight");
  if (c.has(2)) c.constant(2, Type::f32, length, "bias");
  c.require(std::isfinite(c.op.floats[0]) && c.op.floats[0] >= 0.0f, "epsilon is negative or not finite");
}

void check_table(const Checker& c) {
  c.expect(2, 2, 0, 0);
  c.codes(c.x(0), "x");
  c.codes(c.y, "y");
  c.same_sizes(c.x(0));
  c.constant(1, c.y.type, codes_of(c.x(0).grid), "table");
}

void check_prelu(const Checker& c) {
  c.expect(2, 2, 1, 0);
  c.codes(c.x(0), "x");
  c.codes(c.y, "y");
  c.same_sizes(c.x(0));
  // of a tensor without dimensions there is no axis, and no need of one
  const int64_t axis = c.integer(0, 0, std::max(c.y.rank - 1, 0), "axis");
  const int64_t count = c.x(1).count();
  c.require(count == 1 || (c.y.rank > 0 && count == c.y.sizes[axis]), "the slope fits neither 1 nor the axis");
  c.constant(1, Type::f32, count, "slope");
}

void check_mean(const Checker& c) {
  c.require(c.op.inputs.size() == 1 && c.has(0) && c.op.floats.empty(), "wrong number of inputs or floats");
  const View& x = c.x(0);
  c.codes(x, "x");
  c.codes(c.y, "y");
  bool reduced[max_rank] = {};
  for (size_t i = 0; i < c.op.ints.size(); ++i) {
    const int64_t axis = c.integer(i, 0, x.rank - 1, "axis");
    c.require(!reduced[axis], "an axis occurs twice");
    reduced[axis] = true;
  }
  const bool kept = c.y.rank == x.rank;
  int32_t d = 0;
  for (int32_t i = 0; i < x.rank; ++i) {
    if (reduced[i] && !kept) continue;
    c.require(d < c.y.rank && c.y.sizes[d] == (reduced[i] ? 1 : x.sizes[i]), "y does not have the other sizes of x");
    ++d;
  }
  c.require(d == c.y.rank, "y does not have the other sizes of x");
}

void check_operator(const Checker& c) {
  switch (c.op.kind) {
    case Kind::quantize:
    case Kind::dequantize: return check_quantize(c);
    case Kind::requantize:
      c.expect(1, 1, 0, 0);
      c.codes(c.x(0), "x");
      c.codes(c.y, "y");
      return c.same_sizes(c.x(0));
    case Kind::conv: return check_conv(c);
    case Kind::matmul: return check_matmul(c);
    case Kind::add:
    case Kind::sub:
    case Kind::mul:
    case Kind::div: return check_elementwise(c);
    case Kind::max_pool:
    case Kind::avg_pool: return check_window(c);
    case Kind::mean: return check_mean(c);
    case Kind::resize_nearest:
    case Kind::resize_linear: return check_resize(c);
    case Kind::softmax: return check_softmax(c);
    case Kind::layer_norm: return check_layer_norm(c);
    case Kind::table: return check_table(c);
    case Kind::prelu: return check_prelu(c);
    case Kind::concat:
    case Kind::pad:
    case Kind::transpose:
    case Kind::slice:
    case Kind::expand:
    case Kind::roll:
    case Kind::reshape: return check_movement(c);
  }
}

}  // namespace

bool is_grid(Type type, const Grid& g) {
  const Range r = range_of(type);
  return is_finite_positive(g.scale) && g.zero_point >= r.low && g.zero_point <= r.high && g.qmin >= r.low &&
         g.qmax <= r.high && g.qmin <= g.qmax;
}

std::vector<View> resolve_sizes(const Plan& plan, int64_t batch) {
  std::vector<View> views;
  views.reserve(plan.arrays.size());
  for (size_t i = 0; i < plan.arrays.size(); ++i) {
    const Array& a = plan.arrays[i];
    View v{const_cast<void*>(a.data), a.type, a.rank, {}, a.grid};
    int64_t bytes = width_of(a.type);
    for (int32_t d = 0; d < a.rank; ++d) {
      int64_t size = a.sizes[d];
      if (size == INT64_MIN || size == 0 || (size < 0 && __builtin_mul_overflow(-size, batch, &size)) ||
          __builtin_mul_overflow(bytes, size, &bytes) || bytes > max_bytes) {
        fail_plan("tensor '" + a.name + "'", "has a size of 0 or more than 2 GiB");
      }
      v.sizes[d] = size;
    }
    if (static_cast<int32_t>(i) < plan.tensors && is_codes(a.type) && !is_grid(a.type, a.grid)) {
      fail_plan("tensor '" + a.name + "'", "the scale, zero point or range is not one of its type");
    }
    views.push_back(v);
  }
  return views;
}

void check_plan(const Plan& plan, const std::vector<View>& arrays) {
  for (const Operator& op : plan.operators) check_operator(Checker(plan, arrays, op));
}

void Checker::fail(const std::string& cause) const {
  fail_plan("operator '" + op.name + "' (" + kind_name(op.kind) + ")", cause);
}

void Checker::expect(size_t inputs, size_t needed, size_t ints, size_t floats) const {
  require(op.inputs.size() == inputs, "wrong number of inputs");
  for (size_t i = 0; i < needed; ++i) require(has(i), "an input is absent");
  require(op.ints.size() == ints, "wrong number of integers");
  require(op.floats.size() == floats, "wrong number of floats");
}

int64_t Checker::integer(size_t index, int64_t low, int64_t high, const char* what) const {
  const int64_t value = op.ints[index];
  if (value < low || value > high) {
    fail(std::string(what) + " " + std::to_string(value) + " is outside of [" + std::to_string(low) + ", " +
         std::to_string(high) + "]");
  }
  return value;
}

void Checker::codes(const View& view, const char* what) const {
  if (!is_codes(view.type) || !is_grid(view.type, view.grid)) fail(std::string(what) + " has no codes with a grid");
}

void Checker::constant(size_t input, Type type, int64_t count, const char* what) const {
  if (!plan.is_constant(op.inputs[input]) || x(input).type != type || x(input).count() != count) {
    fail(std::string(what) + " is not a constant of its type with " + std::to_string(count) + " elements");
  }
}

void Checker::indices(size_t input, int64_t count, int64_t limit, const char* what) const {
  constant(input, Type::s32, count, what);
  const auto* values = static_cast<const int32_t*>(x(input).data);
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) fail(std::string(what) + " have one that is outside of x");
  }
}

void Checker::scales(size_t input, int64_t count) const {
  constant(input, Type::f32, count, "scales");
  const auto* values = static_cast<const float*>(x(input).data);
  require(std::all_of(values, values + count, is_finite_positive), "a scale is not positive and finite");
}

void Checker::same_codes(const View& a) const {
  require(a.type == y.type && a.type != Type::s4, "x and y have different types");
  if (!is_codes(y.type)) return;
  codes(a, "x");
  codes(y, "y");
  require(a.grid.scale == y.grid.scale && a.grid.zero_point == y.grid.zero_point, "x and y have different grids");
}

void Checker::same_sizes(const View& a) const {
  require(a.rank == y.rank && std::equal(a.sizes, a.sizes + a.rank, y.sizes), "x and y have different sizes");
}

void Checker::permutation(size_t first) const {
  const View& from = x(0);
  require(from.rank == y.rank, "x and y have different ranks");
  bool seen[max_rank] = {};
  for (int32_t d = 0; d < y.rank; ++d) {
    const int64_t source = integer(first + static_cast<size_t>(d), 0, y.rank - 1, "dimension");
    require(!seen[source], "a dimension occurs twice");
    seen[source] = true;
    require(y.sizes[d] == from.sizes[source], "the sizes of y are not those of x in its order");
  }
}

void Checker::broadcasts(const View& a, int32_t skip) const {
  require(a.rank <= y.rank, "an operand has more dimensions than y");
  for (int32_t d = 0; d < a.rank - skip; ++d) {
    const int64_t size = a.sizes[d];
    require(size == 1 || size == y.sizes[d + y.rank - a.rank], "the sizes do not broadcast to those of y");
  }
}

int64_t checked_product(const Checker& c, std::initializer_list<int64_t> values) {
  constexpr int64_t most = int64_t{1} << 40;
  int64_t product = 1;
  for (int64_t value : values) {
    if (__builtin_mul_overflow(product, value, &product) || product > most) c.fail("is too large");
  }
  return product;
}

}  // namespace qat
