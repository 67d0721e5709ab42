// The buffers of observers of the GPU as the kernels take them.
#pragma once

#include "cuda.h"

namespace qat::ops::gpu {

inline ExtremaTensors state(const Tensor& low, const Tensor& high, const Tensor& nonfinite, int64_t channels,
                            int32_t device) {
  check_state(low, "low", ScalarType::Float, channels, device);
  check_state(high, "high", ScalarType::Float, channels, device);
  check_state(nonfinite, "nonfinite", ScalarType::Long, 1, device);
  return {low, high, nonfinite};
}

inline qat::HistogramOut histogram_state(const Tensor& counts, const Tensor& low, const Tensor& high,
                                         const Tensor& nonfinite, int64_t channels, int64_t mantissa_bits,
                                         int32_t device) {
  check_mantissa(mantissa_bits);
  check_state(counts, "counts", ScalarType::Long, channels << (9 + mantissa_bits), device);
  return {counts.mutable_data_ptr<int64_t>(), static_cast<int>(mantissa_bits),
          state(low, high, nonfinite, channels, device).out()};
}

// `Statistics` of observer_state.h.
class Statistics {
 public:
  Statistics(const Device& device, const Tensor& x, int64_t axis, const Tensor& low, const Tensor& high,
             const Tensor& nonfinite, const OptionalTensor& counts, int64_t mantissa_bits,
             std::optional<double> momentum)
      : device_(device), x_(x), axis_(axis), channels_(channels_of(x, axis)), momentum_(momentum) {
    check(!counts.has_value() || !momentum.has_value(), "a histogram has no momentum; give counts or momentum");
    out_ = counts.has_value()
               ? histogram_state(*counts, low, high, nonfinite, channels_, mantissa_bits, device.index)
               : qat::HistogramOut{nullptr, 0, state(low, high, nonfinite, channels_, device.index).out()};
  }

  // Runs pass(out) and takes in what it found.
  template <class Pass>
  void take(const Pass& pass) const {
    if (!momentum_.has_value()) return pass(out_);
    const ExtremaTensors batch = new_extrema(x_, axis_, device_.stream);
    pass(qat::HistogramOut{nullptr, 0, batch.out()});
    check_launch(qat::cuda::move_averages(batch.out(), channels_, *momentum_, out_.extrema, device_.stream),
                 "move_averages");
  }

 private:
  const Device& device_;
  Tensor x_;
  int64_t axis_, channels_;
  qat::HistogramOut out_{};
  std::optional<double> momentum_;
};

}  // namespace qat::ops::gpu
