#include "norm.h"

#include <mutex>

#include "norm_blocks.h"
#include "norm_parts.h"

namespace qat {
void channel_moments(const Kernels& kernels, ParallelFor parallel, const float* x, Layout layout,
                     const Moments& moments) {
  const NormKernels& k = kernels.norm;
  const int64_t channels = layout.channels;
  std::fill_n(moments.low, channels, std::numeric_limits<float>::infinity());
  std::fill_n(moments.high, channels, -std::numeric_limits<float>::infinity());
  Parts parts(layout, 2);
  std::mutex mutex;
  parts.run(parallel, [&](int64_t begin, int64_t end, double* sums) {
    std::vector<float> extrema(static_cast<size_t>(2 * channels));
    float *low = extrema.data(), *high = low + channels;
    std::fill_n(low, channels, std::numeric_limits<float>::infinity());
    std::fill_n(high, channels, -std::numeric_limits<float>::infinity());
    double* const squares = sums + channels;
    over_channels(
        layout, begin, end,
        [&](int64_t at, int64_t rows, int64_t c, int64_t count) {
          k.moments_rows(x + at, rows, count, sums + c, squares + c, low + c, high + c);
        },
        [&](int64_t at, int64_t c, int64_t n) { k.moments_run(x + at, n, sums + c, squares + c, low + c, high + c); });
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t c = 0; c < channels; ++c) {
      moments.low[c] = std::min(moments.low[c], low[c]);
      moments.high[c] = std::max(moments.high[c], high[c]);
    }
  });
  parts.total(0, moments.sum);
  parts.total(1, moments.square);
}

void norm_quantize(const Kernels& kernels, ParallelFor parallel, const float* x, float* y, uint8_t* bits, Layout layout,
                   const NormPass& pass) {
  const NormBlocks blocks(kernels, x, y, bits, layout, pass);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += block) blocks.write(begin, std::min(begin + block, last));
  });
}

void add_tensors(const Kernels& kernels, ParallelFor parallel, const float* x, const float* other, float* y, int64_t n,
                 const ExtremaOut* extrema) {
  const Layout layout{1, 1, n};
  std::mutex mutex;
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      kernels.norm.add_run(x + begin, other + begin, y + begin, end - begin);
      if (extrema != nullptr) local.widen(kernels.f32, y + begin, begin, end);
    }
    if (extrema == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    local.merge_into(*extrema);
  });
}

void gradient_sums(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   Layout layout, double* sum, double* product) {
  sum_products(kernels, parallel, x, layout, sum, product, [&](int64_t begin, int64_t end, float* masked, GridSums&) {
    kernels.f32.mask_run(grad + begin, bits + begin / 8, masked, end - begin);
  });
}

void norm_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   float* dx, Layout layout, const NormGradient& g) {
  const NormKernels& k = kernels.norm;
  const std::vector<float> zeros(static_cast<size_t>(g.slope == nullptr ? layout.channels : 0));
  const float* const slope = g.slope == nullptr ? zeros.data() : g.slope;
  const float* const center = g.slope == nullptr ? zeros.data() : g.center;
  const float* const offset = g.slope == nullptr ? zeros.data() : g.offset;
  const bool plain = g.slope == nullptr;
  const Spread factors(layout, g.factor), slopes(layout, slope), centers(layout, center), offsets(layout, offset);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    float masked[block], a[block], b[block], c[block], d[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last), n = end - begin;
      kernels.f32.mask_run(grad + begin, bits + begin / 8, masked, n);
      if (plain) {
        // x is not read: an infinity in it must not become nan
        kernels.f32.multiply_each(masked, factors.of(begin, end, a), dx + begin, n);
        continue;
      }
      by_block(
          layout, begin, end,
          [&](int64_t i) {
            k.gradient_run(masked, x + begin, dx + begin, n, g.factor[i], slope[i], center[i], offset[i]);
          },
          [&] {
            k.gradient_each(masked, x + begin, dx + begin, n, factors.of(begin, end, a), slopes.of(begin, end, b),
                            centers.of(begin, end, c), offsets.of(begin, end, d));
          });
    }
  });
}

}  // namespace qat
