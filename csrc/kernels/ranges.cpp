#include "ranges.h"

#include <cmath>
#include <mutex>

#include "blocks.h"
#include "grid.h"
#include "weight_rows.h"

namespace qat {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// Infinities included; a nan stays.
template <class T>
void widen_by_all(const T* x, int64_t begin, int64_t end, const Layout& layout, float* low, float* high) {
  over_runs(layout, begin, end, [&](int64_t c, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const float v = value_of(x[i - begin]);
      if (!(v >= low[c])) low[c] = std::isnan(low[c]) ? low[c] : v;
      if (!(v <= high[c])) high[c] = std::isnan(high[c]) ? high[c] : v;
    }
  });
}

struct Ranges {
  explicit Ranges(int64_t channels)
      : low(static_cast<size_t>(channels), inf), high(static_cast<size_t>(channels), -inf) {}
  ExtremaOut out() { return {low.data(), high.data(), &nonfinite}; }
  std::vector<float> low, high;
  int64_t nonfinite = 0;
};

// The range of w * factor, folded once more, by one thread, where it holds what is not finite.
template <class T>
Ranges folded_range(const Kernels& kernels, ParallelFor parallel, const T* w, Layout layout, const Spread& factors) {
  const TypedKernels<T>& k = typed<T>(kernels);
  Ranges ranges(layout.channels);
  const auto fold = [&](int64_t first, int64_t last, const auto& use) {
    float folded[block], buffer[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      k.multiply_each(w + begin, factors.of(begin, end, buffer), folded, end - begin);
      use(folded, begin, end);
    }
  };
  std::mutex mutex;
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    fold(first, last, [&](const float* x, int64_t begin, int64_t end) { local.widen(kernels.f32, x, begin, end); });
    const std::lock_guard<std::mutex> lock(mutex);
    local.merge_into(ranges.out());
  });
  if (ranges.nonfinite == 0) return ranges;
  ranges = Ranges(layout.channels);
  fold(0, layout.size(), [&](const float* x, int64_t begin, int64_t end) {
    widen_by_all(x, begin, end, layout, ranges.low.data(), ranges.high.data());
  });
  return ranges;
}

void set_grids(const float* low, const float* high, int64_t channels, const GridRule& rule, float* scale,
               float* zero_point) {
  for (int64_t c = 0; c < channels; ++c) {
    const CodeGrid grid = grid_of(low[c], high[c], rule);
    scale[c] = grid.scale;
    zero_point[c] = static_cast<float>(grid.zero_point);
  }
}

}  // namespace

CodeGrid grid_of(double low, double high, const GridRule& rule) { return grid::of_range(low, high, rule); }

template <class T>
void whole_range(const Kernels& kernels, ParallelFor parallel, const T* x, Layout layout, float* low, float* high) {
  std::fill_n(low, layout.channels, inf);
  std::fill_n(high, layout.channels, -inf);
  int64_t nonfinite = 0;
  observe_extrema(kernels, parallel, x, layout, {low, high, &nonfinite});
  // rare, and then it matters which channels: once more, by one thread
  if (nonfinite > 0) widen_by_all(x, 0, layout.size(), layout, low, high);
}

template <class T>
void fake_quantize_weight(const Kernels& kernels, ParallelFor parallel, const T* w, T* y, uint8_t* bits, Layout layout,
                          const Factor* factor, float* scale, float* zero_point, const GridRule* rule, Range range) {
  const int64_t channels = layout.channels;
  if (has_weight_rows(layout, factor)) {
    fake_quantize_rows(kernels, parallel, w, y, bits, layout, factor, scale, zero_point, rule, range);
    return;
  }
  if (factor == nullptr) {
    if (rule != nullptr) {
      Ranges ranges(channels);
      whole_range(kernels, parallel, w, layout, ranges.low.data(), ranges.high.data());
      set_grids(ranges.low.data(), ranges.high.data(), channels, *rule, scale, zero_point);
    }
    fake_quantize(kernels, parallel, w, y, bits, layout, scale, zero_point, range, nullptr);
    return;
  }
  const TypedKernels<T>& k = typed<T>(kernels);
  const Spread factors(factor->layout, factor->values);
  if (rule != nullptr) {
    const Ranges ranges = folded_range(kernels, parallel, w, layout, factors);
    set_grids(ranges.low.data(), ranges.high.data(), channels, *rule, scale, zero_point);
  }
  const BlockGrids grids(layout, scale, zero_point);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    float folded[block], buffer[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      const float* const f = factors.of(begin, end, buffer);
      k.multiply_each(w + begin, f, folded, end - begin);
      grids.quantize(kernels.f32, folded, folded, bits == nullptr ? nullptr : bits + begin / 8, begin, end, range);
      k.divide_each(folded, f, y + begin, end - begin);
    }
  });
}

void track_range(const float* low, const float* high, int64_t channels, float momentum, const GridRule& rule,
                 const Tracked& tracked) {
  for (int64_t c = 0; c < channels; ++c) grid::track(low[c], high[c], momentum, rule, tracked, c);
}

#define QAT_INSTANTIATE(T)                                                                                         \
  template void whole_range<T>(const Kernels&, ParallelFor, const T*, Layout, float*, float*);                     \
  template void fake_quantize_weight<T>(const Kernels&, ParallelFor, const T*, T*, uint8_t*, Layout, const Factor*, \
                                        float*, float*, const GridRule*, Range);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
