#include "norm_passes.h"

#include <cmath>

namespace qat::ops {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// What a monotone function makes of the smallest and the largest value of every channel, by the same operations; nan
// where a value is nan.
qat::Range range_after(const std::vector<float>& low, const std::vector<float>& high, const std::vector<float>& factor,
                       const std::vector<float>& shift, qat::Range bounds) {
  float least = inf, most = -inf;
  for (size_t c = 0; c < low.size(); ++c) {
    for (const float x : {low[c], high[c]}) {
      const float v = x * factor[c] + shift[c];
      if (std::isnan(v)) return {v, v};
      least = std::min(least, v);
      most = std::max(most, v);
    }
  }
  return {std::min(std::max(least, bounds.low), bounds.high) + 0.0f,
          std::min(std::max(most, bounds.low), bounds.high) + 0.0f};
}

}  // namespace

Quantizer::Quantizer(const OptionalTensor& low, const OptionalTensor& high, const OptionalTensor& scale,
                     const OptionalTensor& zero_point, const OptionalTensor& tracked, bool track, double momentum,
                     int64_t qmin, int64_t qmax, bool symmetric, int64_t middle, bool power_of_two)
    : quantizes(scale.has_value()), tracks(track), momentum_(static_cast<float>(momentum)),
      rule_{qmin, qmax, symmetric, middle, power_of_two} {
  check(!track || quantizes, "track is set without a scale; give the quantizer's buffers");
  if (!quantizes) return;
  range = code_range(qmin, qmax);
  check(low.has_value() && high.has_value() && zero_point.has_value() && tracked.has_value(),
        "scale is given without low, high, zero_point or tracked; give the quantizer's buffers");
  check_state(*low, "low", ScalarType::Float, 1);
  check_state(*high, "high", ScalarType::Float, 1);
  check_state(*scale, "scale", ScalarType::Float, 1);
  check_state(*zero_point, "zero_point", ScalarType::Int, 1);
  check_state(*tracked, "tracked", ScalarType::Long, 1);
  state_ = {low->mutable_data_ptr<float>(), high->mutable_data_ptr<float>(), scale->mutable_data_ptr<float>(),
           zero_point->mutable_data_ptr<int32_t>()};
  samples_ = tracked->mutable_data_ptr<int64_t>();
}

void Quantizer::follow(float low, float high, int64_t rows) const {
  qat::track_range(&low, &high, 1, momentum_, rule_, state_);
  *samples_ += rows;
}

Lines lines_of(const std::vector<float>& means, const std::vector<float>& inverses, const std::vector<float>& weight,
               const std::vector<float>& bias) {
  const size_t size = means.size();
  Lines lines{std::vector<float>(size), std::vector<float>(size)};
  for (size_t c = 0; c < size; ++c) {
    lines.factor[c] = inverses[c] * weight[c];
    lines.shift[c] = bias[c] - means[c] * lines.factor[c];
  }
  return lines;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const BatchNorm& norm, qat::Range bounds,
                                                        const Quantizer& quantizer, bool with_mask) {
  const OptionalTensor &running_mean = norm.running_mean, &running_var = norm.running_var;
  const bool batch_statistics = norm.batch_statistics;
  const double momentum = norm.momentum, eps = norm.eps;
  check_float(x, "x");
  check(x.dim() >= 2 && x.numel() > 0,
        "x of shape " + shape_of(x) + " has no channels or no elements; give (N, C, ...)");
  const int64_t channels = x.size(1), n = x.numel() / channels;
  const auto size = static_cast<size_t>(channels);
  const std::vector<float> weight = by_channel(norm.gamma, "gamma", channels, 1.0f);
  const std::vector<float> bias = by_channel(norm.beta, "beta", channels, 0.0f);
  check(batch_statistics || (running_mean.has_value() && running_var.has_value()),
        "running_mean or running_var is missing; give them, or take the statistics of the batch");
  for (const auto& [given, name] : {std::pair{&running_mean, "running_mean"}, std::pair{&running_var, "running_var"}}) {
    if (given->has_value()) check_state(**given, name, ScalarType::Float, channels);
  }
  check(!batch_statistics || n > 1, "x of shape " + shape_of(x) + " has one value a channel; batch norm needs more");
  Tensor y = torch::stable::empty_like(x);
  const Tensor bits = new_cpu({with_mask ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
  const Tensor mean = new_cpu({channels}, ScalarType::Float), invstd = new_cpu({channels}, ScalarType::Float);
  float *const means = mean.mutable_data_ptr<float>(), *const inverses = invstd.mutable_data_ptr<float>();
  const Tensor from = dense(x, y);
  const qat::Layout layout = layout_of(from, 1);
  const float* const data = from.const_data_ptr<float>();

  std::vector<float> lows(size, inf), highs(size, -inf);
  if (batch_statistics) {
    std::vector<double> sum(size), square(size);
    qat::channel_moments(kernels(), parallel, data, layout, {sum.data(), square.data(), lows.data(), highs.data()});
    const auto count = static_cast<double>(n);
    for (size_t c = 0; c < size; ++c) {
      const double center = sum[c] / count;
      const double variance = std::max(square[c] / count - center * center, 0.0);
      // a nan is no smaller than zero
      const double spread = std::isnan(sum[c]) ? sum[c] : variance;
      means[c] = static_cast<float>(center);
      inverses[c] = static_cast<float>(1.0 / std::sqrt(spread + eps));
      const auto move = [&](const OptionalTensor& running, double value) {
        if (!running.has_value()) return;
        float& held = running->mutable_data_ptr<float>()[c];
        held = static_cast<float>((1.0 - momentum) * static_cast<double>(held) + momentum * value);
      };
      move(running_mean, center);
      move(running_var, spread * count / (count - 1.0));
    }
  } else {
    const float* const held = running_mean->const_data_ptr<float>();
    const float* const spread = running_var->const_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      means[c] = held[c];
      inverses[c] = 1.0f / std::sqrt(spread[c] + static_cast<float>(eps));
    }
  }
  const Lines lines = lines_of({means, means + channels}, {inverses, inverses + channels}, weight, bias);
  if (quantizer.tracks) {
    int64_t nonfinite = 0;
    if (!batch_statistics) {
      qat::observe_extrema<float>(kernels(), parallel, data, layout, {lows.data(), highs.data(), &nonfinite});
    }
    const qat::Range range = range_after(lows, highs, lines.factor, lines.shift, bounds);
    quantizer.follow(nonfinite > 0 ? NAN : range.low, range.high, x.size(0));
  }
  qat::CodeGrid grid{};
  if (quantizer.quantizes) grid = quantizer.grid();
  qat::norm_quantize(kernels(), parallel, data, y.mutable_data_ptr<float>(),
                     with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr, layout,
                     {lines.factor.data(), lines.shift.data(), bounds, quantizer.quantizes ? &grid : nullptr,
                      quantizer.range, quantizer.clips, quantizer.drop ? &*quantizer.drop : nullptr});
  return {y, bits, mean, invstd};
}

std::tuple<Tensor, Tensor> add_forward(const Tensor& x, const Tensor& other, qat::Range bounds,
                                       const Quantizer& quantizer, bool with_mask) {
  check_float(x, "x");
  check_float(other, "other");
  check(same_shape(x, other),
        "other of shape " + shape_of(other) + " is added to x of shape " + shape_of(x) + "; give tensors of one shape");
  Tensor y = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  const Tensor bits = new_cpu({with_mask ? (n + 7) / 8 : 0}, ScalarType::Byte);
  if (n == 0) return {y, bits};
  const Tensor from = dense(x, y);
  const Tensor second = in_order_of(other, from);
  float* const out = y.mutable_data_ptr<float>();
  const ExtremaTensors extrema = new_extrema(x, -1);
  const qat::ExtremaOut found = extrema.out();
  qat::add_tensors(kernels(), parallel, from.const_data_ptr<float>(), second.const_data_ptr<float>(), out, n,
                   quantizer.tracks ? &found : nullptr);
  if (quantizer.tracks) {
    const qat::Range range = range_after({*found.low}, {*found.high}, {1.0f}, {0.0f}, bounds);
    quantizer.follow(*found.nonfinite > 0 ? NAN : range.low, range.high, x.dim() > 0 ? x.size(0) : 1);
  }
  qat::CodeGrid grid{};
  if (quantizer.quantizes) grid = quantizer.grid();
  const float one = 1.0f, zero = 0.0f;
  qat::norm_quantize(kernels(), parallel, out, out, with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr, {1, 1, n},
                     {&one, &zero, bounds, quantizer.quantizes ? &grid : nullptr, quantizer.range, quantizer.clips,
                      quantizer.drop ? &*quantizer.drop : nullptr});
  return {y, bits};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Saved& saved, bool with_parameters,
                                                 const Sums& sums) {
  const Tensor &x = saved.x, &mask_bits = saved.mask_bits;
  const bool batch_statistics = saved.batch_statistics;
  check_float(grad, "grad");
  check_float(x, "x");
  check(same_shape(grad, x) && x.dim() >= 2 && x.numel() > 0, "grad of shape " + shape_of(grad) +
                                                                   " does not fit x of shape " + shape_of(x) +
                                                                   "; give those of one forward pass");
  check_cpu(mask_bits, "mask_bits");
  check(mask_bits.scalar_type() == ScalarType::Byte && mask_bits.is_contiguous() &&
            mask_bits.numel() == (x.numel() + 7) / 8,
        "mask_bits does not fit x of shape " + shape_of(x) +
            "; give what the forward pass returned with with_mask=True");
  const int64_t channels = x.size(1);
  const auto size = static_cast<size_t>(channels);
  const std::vector<float> weight = by_channel(saved.gamma, "gamma", channels, 1.0f);
  const std::vector<float> means = by_channel(saved.mean, "mean", channels, 0.0f);
  const std::vector<float> inverses = by_channel(saved.invstd, "invstd", channels, 0.0f);
  Tensor dx = torch::stable::empty_like(x);
  const Tensor from = dense(x, dx);
  const Tensor given = in_order_of(grad, from);  // the bits are in the order of memory of x
  const qat::Layout layout = layout_of(from, 1);
  const float *const data = from.const_data_ptr<float>(), *const g = given.const_data_ptr<float>();
  const uint8_t* const bits = mask_bits.const_data_ptr<uint8_t>();
  const int64_t wanted = with_parameters || batch_statistics ? channels : 0;
  const Tensor dgamma = new_cpu({wanted}, ScalarType::Float), dbeta = new_cpu({wanted}, ScalarType::Float);
  std::vector<float> factor(size), slope(size), offset(size);
  for (size_t c = 0; c < size; ++c) factor[c] = weight[c] * inverses[c];
  if (wanted > 0) {
    std::vector<double> sum(size), product(size);
    sums(g, data, layout, sum.data(), product.data());
    const double count = static_cast<double>(x.numel() / channels);
    for (size_t c = 0; c < size; ++c) {
      const double inverse = inverses[c], a = factor[c];
      const double normalized = (product[c] - static_cast<double>(means[c]) * sum[c]) * inverse;
      dgamma.mutable_data_ptr<float>()[c] = static_cast<float>(normalized);
      dbeta.mutable_data_ptr<float>()[c] = static_cast<float>(sum[c]);
      slope[c] = static_cast<float>(-a * inverse * normalized / count);
      offset[c] = static_cast<float>(-a * sum[c] / count);
    }
  }
  qat::norm_gradient(kernels(), parallel, g, bits, data, dx.mutable_data_ptr<float>(), layout,
                     {factor.data(), batch_statistics ? slope.data() : nullptr, means.data(), offset.data()});
  return {dx, dgamma, dbeta};
}

}  // namespace qat::ops
