// From ranges to grids, and how a tracked range moves: one channel at a time, for the host and the device.
//
// Not for the files of single instruction sets: these functions have external linkage.
#pragma once

#include <cmath>

#include "hd.h"
#include "ranges.h"

namespace qat {
namespace grid {

constexpr double range_limit = 0x1p126, scale_floor = 0x1p-40;

QAT_HD bool is_nan(double x) { return x != x; }
QAT_HD bool is_finite(float x) { return x - x == 0.0f; }

// A nan stays one, as in torch.clamp.
QAT_HD double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

QAT_HD double round_even(double x) {
#ifdef __CUDA_ARCH__
  return ::rint(x);
#else
  return std::nearbyint(x);
#endif
}

QAT_HD double power_of_two_above(double scale) {
  int exponent;
#ifdef __CUDA_ARCH__
  const double mantissa = ::frexp(scale, &exponent);
#else
  const double mantissa = std::frexp(scale, &exponent);
#endif
  return mantissa == 0.5 ? scale : scale / mantissa;
}

// `grid_of` of ranges.h.
QAT_HD CodeGrid of_range(double low_bound, double high_bound, const GridRule& rule) {
  const double low = clamp(low_bound, -range_limit, 0.0), high = clamp(high_bound, 0.0, range_limit);
  const auto codes = static_cast<double>(rule.qmax - rule.qmin);
  double scale;
  if (rule.symmetric) {
    const int64_t above = rule.qmax - rule.middle, below = rule.middle - rule.qmin;
    const bool both = above != 0 && below != 0;
    double extent = above != 0 ? high : -low;
    // a nan on either side is the extent
    if (both && !(-low <= extent) && !is_nan(extent)) extent = -low;
    const int64_t fewer = above < below ? above : below, more = above < below ? below : above;
    scale = extent / static_cast<double>(both ? fewer : more);
  } else {
    scale = (high - low) / codes;
  }
  scale = clamp(scale, scale_floor, 2.0 * range_limit / codes);
  if (rule.power_of_two) scale = power_of_two_above(scale);
  const auto rounded = static_cast<float>(scale);
  int64_t zero_point = rule.middle;
  if (!rule.symmetric) {
    const auto qmin = static_cast<double>(rule.qmin), qmax = static_cast<double>(rule.qmax);
    const double exact = round_even(qmin - low / static_cast<double>(rounded));
    zero_point = is_nan(exact) ? rule.qmin : static_cast<int64_t>(clamp(exact, qmin, qmax));
  }
  return {rounded, static_cast<int32_t>(zero_point)};
}

// `track_range` of ranges.h, for one channel.
QAT_HD void track(float low, float high, float momentum, const GridRule& rule, const Tracked& tracked, int64_t channel) {
  float &min = tracked.low[channel], &max = tracked.high[channel];
  if (is_finite(low) && is_finite(high)) {
    const bool unknown = min > max;
    min = unknown ? low : min + momentum * (low - min);
    max = unknown ? high : max + momentum * (high - max);
  }
  if (!(min <= max)) return;
  const CodeGrid made = of_range(min, max, rule);
  tracked.scale[channel] = made.scale;
  tracked.zero_point[channel] = made.zero_point;
}

}  // namespace grid
}  // namespace qat
