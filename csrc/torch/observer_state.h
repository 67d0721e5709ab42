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
  check_mantissa(mantissa_bits);
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

// Where the statistics of x go, whole (axis -1) or by channel: counts and range, a range, or its moving average.
class Statistics {
 public:
  Statistics(const Tensor& x, int64_t axis, const Tensor& low, const Tensor& high, const Tensor& nonfinite,
             const OptionalTensor& counts, int64_t mantissa_bits, std::optional<double> momentum)
      : x_(x), axis_(axis), channels_(axis == -1 ? 1 : x.size(axis)), momentum_(momentum) {
    check(!counts.has_value() || !momentum.has_value(), "a histogram has no momentum; give counts or momentum");
    out_ = counts.has_value() ? histogram_state(*counts, low, high, nonfinite, channels_, mantissa_bits)
                              : qat::HistogramOut{nullptr, 0, state(low, high, nonfinite, channels_).out()};
  }

  // Runs pass(out) and takes in what it found.
  template <class Pass>
  void take(const Pass& pass) const {
    if (!momentum_.has_value()) return pass(out_);
    const ExtremaTensors batch = new_extrema(x_, axis_);
    pass(qat::HistogramOut{nullptr, 0, batch.out()});
    move_range(batch.out(), *momentum_, channels_, out_.extrema);
  }

 private:
  Tensor x_;
  int64_t axis_, channels_;
  qat::HistogramOut out_{};
  std::optional<double> momentum_;
};

}  // namespace qat::ops
