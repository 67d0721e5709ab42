// The fused passes of training on tensors, for static grids (norm.cpp) and learned ones (norm_learned.cpp).
#pragma once

#include <functional>

#include "../kernels/norm.h"
#include "norm_arguments.h"

namespace qat::ops {

// The quantizer of the result: the buffers of a static one, which may follow the batches, or a grid that is given.
struct Quantizer {
  Quantizer(const OptionalTensor& low, const OptionalTensor& high, const OptionalTensor& scale,
            const OptionalTensor& zero_point, const OptionalTensor& tracked, bool track, double momentum, int64_t qmin,
            int64_t qmax, bool symmetric, int64_t middle, bool power_of_two);
  Quantizer(qat::CodeGrid given, qat::Range range, bool clips)
      : quantizes(true), clips(clips), range(range), given_(given) {}

  void follow(float low, float high, int64_t rows) const;
  qat::CodeGrid grid() const {
    return state_.scale == nullptr ? given_ : qat::CodeGrid{*state_.scale, *state_.zero_point};
  }

  bool quantizes, tracks = false, clips = false;
  qat::Range range{0.0f, 1.0f};
  std::optional<qat::Drop> drop;

 private:
  float momentum_ = 0.0f;
  qat::GridRule rule_{};
  qat::CodeGrid given_{1.0f, 0};
  qat::Tracked state_{};
  int64_t* samples_ = nullptr;
};

struct BatchNorm {
  OptionalTensor gamma, beta, running_mean, running_var;
  bool batch_statistics;
  double momentum, eps;
};

// What a batch norm does to a channel: x * factor + shift.
struct Lines {
  std::vector<float> factor, shift;
};
Lines lines_of(const std::vector<float>& means, const std::vector<float>& inverses, const std::vector<float>& weight,
               const std::vector<float>& bias);

// Result, mask, and the mean and inverse deviation that were used.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const BatchNorm& norm, qat::Range bounds,
                                                        const Quantizer& quantizer, bool with_mask);

// Result and mask.
std::tuple<Tensor, Tensor> add_forward(const Tensor& x, const Tensor& other, qat::Range bounds,
                                       const Quantizer& quantizer, bool with_mask);

struct Saved {
  Tensor x, mask_bits;
  OptionalTensor gamma;
  Tensor mean, invstd;
  bool batch_statistics;
};

// Fills the sums by channel of the masked gradient and of its products with x, in the order of memory of x.
using Sums =
    std::function<void(const float* grad, const float* x, const qat::Layout& layout, double* sum, double* product)>;

// Gradients of x, gamma and beta; the last two are empty where nobody needs the sums.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Saved& saved, bool with_parameters,
                                                 const Sums& sums);

inline qat::Range bounds_of(double low, double high) { return {static_cast<float>(low), static_cast<float>(high)}; }

}  // namespace qat::ops
