#include "norm_observe.h"

#include "norm_blocks.h"

namespace qat {
namespace {

// write(begin, end) makes a block of y.
template <class Write>
void observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const float* y, int64_t n,
             const HistogramOut& out, const Write& write) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Write*>(context))(begin, end);
  };
  const BlockWriter writer{call, &write};
  const Layout one{1, 1, n};
  if (out.counts != nullptr) {
    observe_histogram<float>(kernels, parallel, threads, y, one, out, writer);
  } else {
    observe_extrema<float>(kernels, parallel, y, one, out.extrema, writer);
  }
}

}  // namespace

void norm_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const float* x, float* y,
                  Layout layout, const NormPass& pass, const HistogramOut& out) {
  const NormBlocks blocks(kernels, x, y, nullptr, layout, pass);
  observe(kernels, parallel, threads, y, layout.size(), out,
          [&](int64_t begin, int64_t end) { blocks.write(begin, end); });
}

void add_observe(const Kernels& kernels, ParallelFor parallel, int64_t threads, const float* x, const float* other,
                 float* y, int64_t n, Range bounds, const HistogramOut& out) {
  const float one = 1.0f, zero = 0.0f;
  const NormBlocks blocks(kernels, y, y, nullptr, {1, 1, n}, {&one, &zero, bounds, nullptr, {0.0f, 1.0f}});
  observe(kernels, parallel, threads, y, n, out, [&](int64_t begin, int64_t end) {
    kernels.norm.add_run(x + begin, other + begin, y + begin, end - begin);
    blocks.write(begin, end);
  });
}

}  // namespace qat
