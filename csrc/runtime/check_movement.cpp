// What moves elements and changes none.
#include <algorithm>

#include "check.h"

namespace qat {
namespace {

void check_concat(const Checker& c) {
  c.require(!c.op.inputs.empty() && c.op.ints.size() == 1 && c.op.floats.empty(), "wrong number of inputs or integers");
  const int64_t axis = c.integer(0, 0, c.y.rank - 1, "axis");
  int64_t total = 0;
  for (size_t i = 0; i < c.op.inputs.size(); ++i) {
    c.require(c.has(i), "an input is absent");
    const View& x = c.x(i);
    if (is_codes(c.y.type)) {
      c.codes(x, "an input");
      c.codes(c.y, "y");
    } else {
      c.require(x.type == c.y.type, "an input has another type than y");
    }
    c.require(x.rank == c.y.rank, "an input has another rank than y");
    for (int32_t d = 0; d < x.rank; ++d) {
      c.require(d == axis || x.sizes[d] == c.y.sizes[d], "an input has other sizes than y");
    }
    // each is at most 2^31, and so are the number of inputs and the sum of those before
    total += x.sizes[axis];
    c.require(total <= c.y.sizes[axis], "the inputs are longer than y");
  }
  c.require(total == c.y.sizes[axis], "the inputs are shorter than y");
}

void check_pad(const Checker& c) {
  const View& x = c.x(0);
  const auto rank = static_cast<size_t>(x.rank);
  c.expect(1, 1, 2 + 2 * rank, 0);
  c.same_codes(x);
  c.require(x.rank == c.y.rank, "x and y have different ranks");
  const int64_t mode = c.integer(0, 0, 2, "mode");
  if (is_codes(x.type)) {
    c.integer(1, c.y.grid.qmin, c.y.grid.qmax, "code");
  } else {
    c.integer(1, 0, 0, "code");
  }
  for (size_t d = 0; d < rank; ++d) {
    const int64_t most = mode == 1 ? x.sizes[d] - 1 : max_bytes;
    const int64_t begin = c.integer(2 + 2 * d, 0, most, "padding"), end = c.integer(3 + 2 * d, 0, most, "padding");
    c.require(c.y.sizes[d] == x.sizes[d] + begin + end, "y does not have the sizes of x with its padding");
  }
}

void check_slice(const Checker& c) {
  const View& x = c.x(0);
  const auto rank = static_cast<size_t>(x.rank);
  c.expect(1, 1, 2 * rank, 0);
  c.same_codes(x);
  c.require(x.rank == c.y.rank, "x and y have different ranks");
  for (size_t d = 0; d < rank; ++d) {
    const int64_t start = c.integer(d, 0, x.sizes[d] - 1, "start");
    const int64_t step = c.integer(rank + d, -max_bytes, max_bytes, "step");
    const int64_t last = start + (c.y.sizes[d] - 1) * step;
    c.require(step != 0 && last >= 0 && last < x.sizes[d], "reads outside of x");
  }
}

}  // namespace

void check_movement(const Checker& c) {
  if (c.op.kind == Kind::concat) return check_concat(c);
  c.require(c.op.inputs.size() == 1 && c.has(0), "wrong number of inputs");
  const View& x = c.x(0);
  switch (c.op.kind) {
    case Kind::pad: return check_pad(c);
    case Kind::slice: return check_slice(c);
    case Kind::transpose:
      c.expect(1, 1, static_cast<size_t>(c.y.rank), 0);
      c.same_codes(x);
      return c.permutation(0);
    case Kind::expand:
      c.expect(1, 1, 0, 0);
      c.same_codes(x);
      return c.broadcasts(x, 0);
    case Kind::roll:
      c.expect(1, 1, static_cast<size_t>(x.rank), 0);
      c.same_codes(x);
      return c.same_sizes(x);
    default:
      c.expect(1, 1, 0, 0);
      c.same_codes(x);
      return c.require(x.count() == c.y.count(), "x and y have different numbers of elements");
  }
}

}  // namespace qat
