// The operators of ranges.cpp on the GPU: ranges become grids there, and the host never waits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_weight.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;

// The smallest and largest values by channel, infinities and nan included. `like` has the shape.
template <class T>
ExtremaTensors whole_range(const Tensor& like, const T* data, int64_t axis, const qat::Layout& layout,
                           cudaStream_t stream) {
  const ExtremaTensors extrema = new_extrema(like, axis, stream);
  check_launch(qat::cuda::observe_extrema<T>(data, layout, extrema.out(), stream), "observe_extrema");
  check_launch(qat::cuda::include_nonfinite<T>(data, layout, extrema.out(), stream), "include_nonfinite");
  return extrema;
}

struct Grids {
  Tensor scale, zero_point;  // float32, one a channel
};

template <class T>
Grids grids_of(const Tensor& like, const T* data, int64_t axis, const qat::Layout& layout, const qat::GridRule& rule,
               cudaStream_t stream) {
  const ExtremaTensors range = whole_range<T>(like, data, axis, layout, stream);
  const Grids made{new_cuda(like, {layout.channels}, ScalarType::Float),
                   new_cuda(like, {layout.channels}, ScalarType::Float)};
  check_launch(qat::cuda::set_grids(range.low.const_data_ptr<float>(), range.high.const_data_ptr<float>(),
                                    layout.channels, rule, made.scale.mutable_data_ptr<float>(),
                                    made.zero_point.mutable_data_ptr<float>(), stream),
               "set_grids");
  return made;
}

std::tuple<Tensor, Tensor> fake_quantize_weight_forward(Tensor weight, OptionalTensor scale, OptionalTensor zero_point,
                                                        OptionalTensor gamma, OptionalTensor var, double eps,
                                                        double gamma_floor, int64_t qmin, int64_t qmax, int64_t axis,
                                                        bool symmetric, int64_t middle, bool power_of_two,
                                                        int64_t channel_axis, int64_t groups, bool with_mask) {
  const Device device(weight);
  check_values(weight, "weight", device.index);
  check_axis(weight, axis);
  const qat::Range range = code_range(qmin, qmax);
  const qat::GridRule rule = rule_of(qmin, qmax, symmetric, middle, power_of_two);
  check(scale.has_value() == zero_point.has_value(),
        "one of scale and zero_point is missing; give both, or neither for a grid that follows the weight");
  const int64_t count = channels_of(weight, axis);
  std::optional<Grids> given;
  if (scale.has_value()) {
    given = Grids{grid_values(*scale, "scale", count, weight), grid_values(*zero_point, "zero_point", count, weight)};
  }
  const Tensor y = torch::stable::empty_like(weight), bits = new_bits(weight, with_mask);
  if (weight.numel() == 0) return {y, bits};
  const Tensor from = dense(weight, y);
  const int64_t n = from.numel();
  const qat::Layout layout = layout_of(from, axis);
  const auto quantize = [&](const auto* data, auto* to) {
    const Grids grids = given ? *given : grids_of(from, data, axis, layout, rule, device.stream);
    check_launch(qat::cuda::fake_quantize(data, to, bits_or_null(bits, with_mask), layout,
                                          grids.scale.const_data_ptr<float>(),
                                          grids.zero_point.const_data_ptr<float>(), range, {}, device.stream),
                 "fake_quantize_weight_forward");
  };
  check(var.has_value() || !gamma.has_value(), "gamma is given without var; give both, or neither");
  if (!var.has_value()) {
    by_type(weight, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      quantize(static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
    });
    return {y, bits};
  }
  const WeightNorm norm(gamma, *var, outputs_of(weight, channel_axis, groups), device.index);
  const qat::cuda::BatchNorm factor = norm.factor(eps, gamma_floor, channel_map(from, channel_axis, groups));
  // in the order of the memory of the weight
  const Tensor folded = new_cuda(weight, {n}, ScalarType::Float);
  float* const values = folded.mutable_data_ptr<float>();
  by_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check_launch(qat::cuda::fold_weight<T>(static_cast<const T*>(from.const_data_ptr()), n, factor, values,
                                           device.stream),
                 "fold_weight");
    quantize(static_cast<const float*>(values), values);
    check_launch(qat::cuda::unfold_weight<T>(values, n, factor, static_cast<T*>(y.mutable_data_ptr()), device.stream),
                 "unfold_weight");
  });
  return {y, bits};
}

std::tuple<Tensor, Tensor> fake_quantize_track_forward(Tensor x, Tensor low, Tensor high, Tensor scale,
                                                       Tensor zero_point, Tensor tracked, double momentum,
                                                       int64_t qmin, int64_t qmax, int64_t axis, bool symmetric,
                                                       int64_t middle, bool power_of_two, bool with_mask) {
  const Device device(x);
  check_values(x, "x", device.index);
  check_axis(x, axis);
  const qat::Range range = code_range(qmin, qmax);
  const int64_t count = channels_of(x, axis);
  const Buffers buffers{low, high, scale, zero_point, tracked};
  buffers.check(count, device.index);
  const qat::cuda::Tracking tracking =
      buffers.tracking(momentum, rule_of(qmin, qmax, symmetric, middle, power_of_two));
  const Tensor y = torch::stable::empty_like(x), bits = new_bits(x, with_mask);
  const Tensor codes = new_cuda(x, {count}, ScalarType::Float);
  const auto track = [&](const ExtremaTensors& batch, const int64_t* nonfinite, int64_t channels) {
    check_launch(qat::cuda::track_ranges(batch.low.const_data_ptr<float>(), batch.high.const_data_ptr<float>(),
                                         nonfinite, channels, rows_of(x), tracking, codes.mutable_data_ptr<float>(),
                                         device.stream),
                 "track_ranges");
  };
  if (x.numel() == 0) {
    track(new_extrema(x, axis, device.stream), nullptr, 0);  // only the samples are counted
    return {y, bits};
  }
  const Tensor from = dense(x, y);
  const qat::Layout layout = layout_of(from, axis);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const data = static_cast<const T*>(from.const_data_ptr());
    if (count == 1) {
      const ExtremaTensors batch = new_extrema(x, axis, device.stream);
      check_launch(qat::cuda::observe_extrema<T>(data, layout, batch.out(), device.stream), "observe_extrema");
      track(batch, batch.nonfinite.const_data_ptr<int64_t>(), count);
    } else {
      track(whole_range<T>(from, data, axis, layout, device.stream), nullptr, count);
    }
    check_launch(qat::cuda::fake_quantize<T>(data, static_cast<T*>(y.mutable_data_ptr()),
                                             bits_or_null(bits, with_mask), layout, tracking.state.scale,
                                             codes.const_data_ptr<float>(), range, {}, device.stream),
                 "fake_quantize_track_forward");
  });
  return {y, bits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("fake_quantize_weight_forward", TORCH_BOX(&fake_quantize_weight_forward));
  m.impl("fake_quantize_track_forward", TORCH_BOX(&fake_quantize_track_forward));
}
