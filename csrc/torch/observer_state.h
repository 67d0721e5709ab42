// The buffers of observers as the kernels take them.
#pragma once

#include "../kernels/histogram.h"
#include "tensors.h"

namespace qat::ops {

inline ExtremaTensors state(const Tensor& low, const Tensor& high, const Tensor& nonfinite, int64_t channels) {
  check_state(low, "low", ScalarType::Float, channels);
  check_state(high, "high", ScalarType::Float, channels);
  check_state(nonfinite, "nonfinite", ScalarType::Long, 1);
  return {low, high, nonfinite};
}

inline qat::HistogramOut histogram_state(const Tensor& counts, const Tensor& low, const Tensor& high,
                                         const Tensor& nonfinite, int64_t channels, int64_t mantissa_bits) {
  check(mantissa_bits >= 0 && mantissa_bits <= 10,
        "mantissa_bits " + std::to_string(mantissa_bits) + " is outside [0, 10]; choose one of these");
  check_state(counts, "counts", ScalarType::Long, channels << (9 + mantissa_bits));
  return {counts.mutable_data_ptr<int64_t>(), static_cast<int>(mantissa_bits),
          state(low, high, nonfinite, channels).out()};
}

// Moves a range towards that of a batch, which sets a range that is none yet.
inline void move_range(const qat::ExtremaOut& found, double momentum, int64_t channels, const qat::ExtremaOut& out) {
  for (int64_t c = 0; c < channels; ++c) {
    if (found.low[c] > found.high[c]) continue;
    const bool first = out.low[c] > out.high[c];
    const auto move = [&](float& to, float value) {
      // in double the difference of two floats cannot overflow, and a constant stays exactly itself
      const double old = to;
      to = first ? value : static_cast<float>(old + momentum * (value - old));
    };
    move(out.low[c], found.low[c]);
    move(out.high[c], found.high[c]);
  }
  *out.nonfinite += *found.nonfinite;
}

}  // namespace qat::ops
