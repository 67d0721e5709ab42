// One C function that calls any operator, for the tests, which describe tensors as the kernels do (integer_ops.py).
#include <cstring>

#include "elementwise.h"
#include "layout.h"
#include "normalize.h"
#include "pool.h"
#include "quantize.h"
#include "resize.h"
#include "table.h"

namespace {

// One part after another, the last one first, each as small as it may be.
void run_parts(void*, int64_t begin, int64_t end, int64_t grain, qat::Task task, void* context) {
  while (begin < end) {
    const int64_t start = end - begin > grain ? end - grain : begin;
    task(start, end, context);
    end = start;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int run_operator(const char* name, const char* isa, int32_t split,
                                                                   const qat::View* views, int32_t count,
                                                                   const int64_t* ints, float number,
                                                                   const void* const* arrays) {
  using namespace qat;
  const Threads threads{split != 0 ? run_parts : run_serially, nullptr, split != 0 ? 4 : 1};
  const View &x = views[0], &y = views[count - 1];
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const auto small = [&](int32_t i) { return static_cast<int32_t>(ints[i]); };
  const auto floats = [&](int32_t i) { return static_cast<const float*>(arrays[i]); };
  const auto indices = [&](int32_t i) { return static_cast<const int32_t*>(arrays[i]); };
  const auto window = [&] {
    return PoolShape{small(0), small(1), small(2), small(3), small(4), small(5),
                     small(6), small(7), small(8), small(9), small(10) != 0};
  };
  if (is("quantize")) {
    quantize(isa, threads, x, y, ints);
  } else if (is("dequantize")) {
    dequantize(isa, threads, x, y, ints);
  } else if (is("requantize")) {
    requantize(isa, threads, x, y);
  } else if (is("add")) {
    add(isa, threads, x, views[1], y);
  } else if (is("sub")) {
    sub(isa, threads, x, views[1], y);
  } else if (is("mul")) {
    mul(isa, threads, x, views[1], y);
  } else if (is("div")) {
    div(isa, threads, x, views[1], y);
  } else if (is("table")) {
    apply_table(isa, threads, x, arrays[0], y);
  } else if (is("prelu")) {
    prelu(isa, threads, x, floats(0), ints[0], small(1), y);
  } else if (is("softmax")) {
    const SoftmaxTable table = prepare_softmax(x.grid, y.grid, x.sizes[ints[0]]);
    softmax(isa, threads, x, small(0), &table, y);
  } else if (is("layer_norm")) {
    layer_norm(isa, threads, x, small(0), floats(0), floats(1), number, y);
  } else if (is("max_pool")) {
    max_pool(isa, threads, x, window(), y);
  } else if (is("avg_pool")) {
    avg_pool(isa, threads, x, window(), y);
  } else if (is("mean")) {
    mean(isa, threads, x, ints + 1, small(0), y);
  } else if (is("resize_nearest")) {
    resize_nearest(isa, threads, x, indices(0), indices(1), y);
  } else if (is("resize_linear")) {
    const LinearTaps h{indices(0), indices(1), floats(2)}, w{indices(3), indices(4), floats(5)};
    resize_linear(isa, threads, x, h, w, y);
  } else if (is("pad")) {
    pad(isa, threads, x, ints + 2, static_cast<PadMode>(ints[0]), small(1), y);
  } else if (is("concat")) {
    concat(isa, threads, views, count - 1, small(0), y);
  } else if (is("transpose")) {
    transpose(isa, threads, x, ints, y);
  } else if (is("slice")) {
    slice(isa, threads, x, ints, ints + x.rank, y);
  } else if (is("expand")) {
    expand(isa, threads, x, y);
  } else if (is("roll")) {
    roll(isa, threads, x, ints, y);
  } else {
    return 1;
  }
  return 0;
}
