// The operators of the GPU on plain pointers of device memory; nothing here knows torch.
//
// Every function queues work on `stream` and returns the launch's error, without waiting. T is float, or uint16_t for
// bfloat16. n may be 0 nowhere: the caller returns early.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "elements.h"
#include "gather.h"
#include "requantize.h"

namespace qat::cuda {

// Widened and added to; one value a channel, the count of nan and infinities for all. null: not wanted.
struct ExtremaOut {
  float* low;
  float* high;
  int64_t* nonfinite;
};

// Sets low to inf, high to -inf and the count to 0.
cudaError_t clear_extrema(ExtremaOut extrema, int64_t channels, cudaStream_t stream);

// `bits` has ceil(n / 8) bytes, or is null. scale and zero_point: one float32 a channel.
template <class T>
cudaError_t fake_quantize(const T* x, T* y, uint8_t* bits, Layout layout, const float* scale, const float* zero_point,
                          Range range, ExtremaOut extrema, cudaStream_t stream);

template <class T>
cudaError_t mask_gradient(const T* grad, const uint8_t* bits, T* out, int64_t n, cudaStream_t stream);

template <class T>
cudaError_t observe_extrema(const T* x, Layout layout, ExtremaOut extrema, cudaStream_t stream);

// Counts by the upper 16 bits of the float32 pattern into counts[65536], and widens the extrema of the one channel.
template <class T>
cudaError_t observe_histogram(const T* x, int64_t n, int64_t* counts, ExtremaOut extrema, cudaStream_t stream);

// Floats of scratch that a reduction over all but the channels needs.
int64_t reduction_scratch(Layout layout);

// Gradients of a learned grid (LSQ, LSQ+): dx through the range mask, and for each channel the sums of
// grad * d(y)/d(scale) and grad * d(y)/d(zero_point).
template <class T>
cudaError_t learned_backward(const T* x, const T* grad, T* dx, Layout layout, const float* scale,
                             const float* zero_point, Range range, float* dscale, float* dzero_point, float* scratch,
                             cudaStream_t stream);

enum class Activation : int { none = 0, relu = 1, relu6 = 2 };

// Batch norm: statistics of this batch (mean, biased variance).
template <class T>
cudaError_t batch_statistics(const T* x, Layout layout, float* mean, float* variance, float* scratch,
                             cudaStream_t stream);

// Of the statistics, the frozen ones too: inverse[c] = 1 / sqrt(variance[c] + epsilon).
cudaError_t inverse_deviation(const float* variance, float epsilon, int64_t channels, float* inverse,
                              cudaStream_t stream);

struct Norm {
  const float *mean, *inverse, *gamma, *beta;  // one a channel
};

// y = fake_quantize(activation(norm(x) + residual)); bit i tells that the gradient passes (activation and range).
// residual may be null; scale null: no fake quantization; bits may be null; extrema are those before quantization, of
// the one channel.
template <class T>
cudaError_t norm_apply(const T* x, const T* residual, T* y, uint8_t* bits, Layout layout, Norm norm,
                       Activation activation, const float* scale, const float* zero_point, Range range,
                       ExtremaOut extrema, cudaStream_t stream);

// dgamma and dbeta, then dx, and the residual's gradient where dresidual is not null. `frozen`: the statistics were
// constants.
template <class T>
cudaError_t norm_backward(const T* x, const T* grad, const uint8_t* bits, Layout layout, Norm norm, bool frozen, T* dx,
                          T* dresidual, float* dgamma, float* dbeta, float* scratch, cudaStream_t stream);

// out[n] = bias[n] - x_zero_point * sum of weight row n; bias may be null.
cudaError_t fold_zero_point(const int8_t* weight, const int32_t* bias, int32_t x_zero_point, int64_t rows,
                            int64_t depth, int32_t* out, cudaStream_t stream);

// x (batch, in_h, in_w, groups * inputs) of u8 or s8, weight (groups * outputs, kernel_h, kernel_w, inputs) of s8, zero
// point 0; bias from fold_zero_point; y and residual (batch, out_h, out_w, groups * outputs) of bytes.
cudaError_t int8_conv(const void* x, bool x_signed, int32_t x_zero_point, const int8_t* weight, const int32_t* bias,
                      const float* multiplier, const ConvShape& shape, const Requantize& requantize,
                      const void* residual, void* y, cudaStream_t stream);

}  // namespace qat::cuda
