#include "ranges.h"

#include <cmath>
#include <mutex>

#include "blocks.h"
#include "weight_rows.h"

namespace qat {
namespace {

constexpr double range_limit = 0x1p126, scale_floor = 0x1p-40;
constexpr float inf = std::numeric_limits<float>::infinity();

// A nan stays one, as in torch.clamp.
double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

double power_of_two_above(double scale) {
  int exponent;
  const double mantissa = std::frexp(scale, &exponent);
  return mantissa == 0.5 ? scale : scale / mantissa;
}

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

CodeGrid grid_of(double low_bound, double high_bound, const GridRule& rule) {
  const double low = clamp(low_bound, -range_limit, 0.0), high = clamp(high_bound, 0.0, range_limit);
  double scale;
  if (rule.symmetric) {
    const int64_t above = rule.qmax - rule.middle, below = rule.middle - rule.qmin;
    double extent = above != 0 ? high : -low;
    // a nan on either side is the extent
    if (above != 0 && below != 0 && !(-low <= extent) && !std::isnan(extent)) extent = -low;
    scale = extent / static_cast<double>(above != 0 && below != 0 ? std::min(above, below) : std::max(above, below));
  } else {
    scale = (high - low) / static_cast<double>(rule.qmax - rule.qmin);
  }
  scale = clamp(scale, scale_floor, 2.0 * range_limit / static_cast<double>(rule.qmax - rule.qmin));
  if (rule.power_of_two) scale = power_of_two_above(scale);
  const auto rounded = static_cast<float>(scale);
  int64_t zero_point = rule.middle;
  if (!rule.symmetric) {
    const auto qmin = static_cast<double>(rule.qmin), qmax = static_cast<double>(rule.qmax);
    const double exact = std::nearbyint(qmin - low / static_cast<double>(rounded));
    zero_point = std::isnan(exact) ? rule.qmin : static_cast<int64_t>(clamp(exact, qmin, qmax));
  }
  return {rounded, static_cast<int32_t>(zero_point)};
}

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
  for (int64_t c = 0; c < channels; ++c) {
    float &min = tracked.low[c], &max = tracked.high[c];
    if (std::isfinite(low[c]) && std::isfinite(high[c])) {
      const bool unknown = min > max;
      min = unknown ? low[c] : min + momentum * (low[c] - min);
      max = unknown ? high[c] : max + momentum * (high[c] - max);
    }
    if (!(min <= max)) continue;
    const CodeGrid grid = grid_of(min, max, rule);
    tracked.scale[c] = grid.scale;
    tracked.zero_point[c] = grid.zero_point;
  }
}

#define QAT_INSTANTIATE(T)                                                                                         \
  template void whole_range<T>(const Kernels&, ParallelFor, const T*, Layout, float*, float*);                     \
  template void fake_quantize_weight<T>(const Kernels&, ParallelFor, const T*, T*, uint8_t*, Layout, const Factor*, \
                                        float*, float*, const GridRule*, Range);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
