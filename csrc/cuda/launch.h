// The operators of the GPU on plain pointers of device memory; nothing here knows torch.
//
// Every function queues work on `stream` and returns the launch's error, without waiting. T is float, or uint16_t for
// bfloat16. n may be 0 nowhere: the caller returns early.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kernels/histogram.h"
#include "../kernels/norm.h"
#include "../kernels/ranges.h"
#include "gather.h"
#include "requantize.h"
#include "weight.h"

namespace qat::cuda {

// ---- extrema (null: not wanted) and static grids

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

// Behind observe_extrema: widens by what is not finite, by channel; a nan makes both ends nan. Free where the count is 0.
template <class T>
cudaError_t include_nonfinite(const T* x, Layout layout, ExtremaOut extrema, cudaStream_t stream);

// Moves the ranges of `to` towards those of a batch, and adds the count.
cudaError_t move_averages(ExtremaOut batch, int64_t channels, double momentum, ExtremaOut to, cudaStream_t stream);

// Counts into (channels, bins), and widens the extrema. The bins of nan and infinities are not touched.
template <class T>
cudaError_t observe_histogram(const T* x, Layout layout, const HistogramOut& out, cudaStream_t stream);

// `fake_quantize`, and `observe_histogram` of x; its extrema alone where `out` has no counts. Histograms by channel take a
// second pass. y is not x.
template <class T>
cudaError_t fake_quantize_observe(const T* x, T* y, uint8_t* bits, Layout layout, const float* scale,
                                  const float* zero_point, Range range, const HistogramOut& out, cudaStream_t stream);

// ---- grids that follow the data

// The grids of ranges; the zero points as numbers.
cudaError_t set_grids(const float* low, const float* high, int64_t channels, const GridRule& rule, float* scale,
                      float* zero_point, cudaStream_t stream);

struct Tracking {
  Tracked state;
  int64_t* samples;
  float momentum;
  GridRule rule;
};

// `track_range` of csrc/kernels/ranges.h, and `rows` more samples. Where *nonfinite is not 0 no range is moved; null: what
// is not finite is in the extrema. `zero_point` gets the zero points as numbers.
cudaError_t track_ranges(const float* low, const float* high, const int64_t* nonfinite, int64_t channels, int64_t rows,
                         const Tracking& tracking, float* zero_point, cudaStream_t stream);

// out = w * f, and y = folded / f.
template <class T>
cudaError_t fold_weight(const T* w, int64_t n, const BatchNorm& f, float* out, cudaStream_t stream);
template <class T>
cudaError_t unfold_weight(const float* folded, int64_t n, const BatchNorm& f, T* y, cudaStream_t stream);

// out[c] = f of the output channel c.
cudaError_t weight_factors(const BatchNorm& f, int64_t channels, float* out, cudaStream_t stream);

// ---- learned grids

// Bytes of scratch, aligned as for a double, that a reduction over all but the channels needs.
int64_t reduction_scratch(Layout layout);

// The codes next to learned zero points.
cudaError_t nearest_codes(const float* zero_point, int64_t count, Range range, float* codes, cudaStream_t stream);

// Gradients of a learned grid (LSQ, LSQ+): dx through the range mask, and for each channel the sums of
// grad * d(y)/d(scale) and grad * d(y)/d(zero_point), times grad_scale. `clips`: of a learned clip (PACT).
template <class T>
cudaError_t learned_backward(const T* x, const T* grad, T* dx, Layout layout, const float* scale,
                             const float* zero_point, Range range, bool clips, double grad_scale, float* dscale,
                             float* dzero_point, void* scratch, cudaStream_t stream);

// The same of fake_quantize(w f) / f, the factor being a constant. dzero_point may be null.
template <class T>
cudaError_t learned_weight_backward(const T* w, const T* grad, T* dw, Layout layout, const float* scale,
                                    const float* zero_point, Range range, const Factors& f, double grad_scale,
                                    float* dscale, float* dzero_point, void* scratch, cudaStream_t stream);

// out[i] = the number of place i (csrc/kernels/drop_hash.h).
cudaError_t place_numbers(int64_t seed, float* out, int64_t n, cudaStream_t stream);

// ---- DoReFa's weights

// ratio = m / tanh(m), m the largest magnitude of the extrema (nan where there is one), 1 where that is zero or nan;
// y = tanh(w) * ratio.
cudaError_t tanh_weight(const float* w, float* y, int64_t n, const float* low, const float* high, float* ratio,
                        cudaStream_t stream);

// dw = grad * ratio * (1 - tanh(w)^2)
cudaError_t tanh_weight_gradient(const float* grad, const float* w, const float* ratio, float* dw, int64_t n,
                                 cudaStream_t stream);

// ---- batch norm or addition, clamp, fake quantization

struct NormParameters {
  const float *gamma, *beta;           // null: ones, zeros
  float *running_mean, *running_var;   // null: none
  double momentum, eps;
};

// One value a channel; low and high are the extrema of x.
struct NormLines {
  float *mean, *inverse, *factor, *shift, *low, *high;
};

// Statistics of the batch, the running ones moved towards them, and the extrema.
cudaError_t batch_lines(const float* x, Layout layout, const NormParameters& parameters, const NormLines& lines,
                        void* scratch, cudaStream_t stream);

// Of the running statistics; the extrema stay as they are.
cudaError_t frozen_lines(int64_t channels, const NormParameters& parameters, const NormLines& lines,
                         cudaStream_t stream);

// Tracks the range of the one grid: that of clamped lines through the extrema of the channels. factor null: the extrema are
// those of the one tensor. nonfinite as in `track_ranges`.
cudaError_t track_lines(const float* low, const float* high, const float* factor, const float* shift,
                        const int64_t* nonfinite, int64_t channels, Range bounds, int64_t rows,
                        const Tracking& tracking, cudaStream_t stream);

// Steps behind the line or the sum; scale null: no fake quantization. A threshold of 0 drops nothing.
struct StepsOnDevice {
  Range bounds;
  const float* scale;
  const int32_t* zero_point;
  Range codes;
  bool clips = false;
  Drop drop{0, 0.0f};
};

// y = steps of x * factor + shift; bit i of `bits` (may be null) tells that the gradient passes.
cudaError_t norm_apply(const float* x, float* y, uint8_t* bits, Layout layout, const float* factor, const float* shift,
                       const StepsOnDevice& steps, cudaStream_t stream);

// y = steps of x + other.
cudaError_t add_apply(const float* x, const float* other, float* y, uint8_t* bits, int64_t n,
                      const StepsOnDevice& steps, cudaStream_t stream);

// Widens by x + other.
cudaError_t add_extrema(const float* x, const float* other, int64_t n, ExtremaOut extrema, cudaStream_t stream);

// One value a channel. dgamma null: the statistics were constants and no gradient of gamma and beta is wanted; slope null:
// the statistics were constants.
struct NormSlopes {
  const float *gamma, *mean, *inverse;  // gamma null: ones
  float *factor, *slope, *offset, *dgamma, *dbeta;
};

// The gradients of batch norm, of gamma and beta too where they are not null.
cudaError_t norm_backward(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                          const NormSlopes& slopes, float* dx, void* scratch, cudaStream_t stream);

// The last pass of `norm_backward`, with slopes that are there.
cudaError_t norm_gradient(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                          const NormSlopes& slopes, float* dx, cudaStream_t stream);

// Where the sums for a learned grid go: `sums` has two doubles a channel; dzero_point may be null.
struct GridGradient {
  double grad_scale;
  double* sums;
  float *dscale, *dzero_point;
};

// `norm_backward` of steps on a learned grid, with all of the slopes' gradients. beta (null: zeros) makes the lines, which
// go to `shift` and the slopes' factor.
cudaError_t norm_learned_backward(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                                  const NormSlopes& slopes, const float* beta, float* shift,
                                  const StepsOnDevice& steps, const GridGradient& grid, float* dx, void* scratch,
                                  cudaStream_t stream);

// Of an addition; dx is the gradient of either operand. `sums` is not used.
cudaError_t add_learned_backward(const float* x, const float* other, const float* grad, int64_t n,
                                 const StepsOnDevice& steps, const GridGradient& grid, float* dx, void* scratch,
                                 cudaStream_t stream);

// ---- codes

// out[n] = bias[n] - x_zero_point * sum of weight row n; bias may be null.
cudaError_t fold_zero_point(const int8_t* weight, const int32_t* bias, int32_t x_zero_point, int64_t rows,
                            int64_t depth, int32_t* out, cudaStream_t stream);

// x (batch, in_h, in_w, groups * inputs) of u8 or s8, weight (groups * outputs, kernel_h, kernel_w, inputs) of s8, zero
// point 0; bias from fold_zero_point; y and residual (batch, out_h, out_w, groups * outputs) of bytes.
cudaError_t int8_conv(const void* x, bool x_signed, int32_t x_zero_point, const int8_t* weight, const int32_t* bias,
                      const float* multiplier, const ConvShape& shape, const Requantize& requantize,
                      const void* residual, void* y, cudaStream_t stream);

}  // namespace qat::cuda
