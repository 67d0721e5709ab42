// Kernels of training: fake quantization, its gradient, and the statistics of observers.
//
// Nothing here knows torch. A `Kernels` table holds what one instruction set computes on a run of memory; the drivers
// in training.h cut tensors into such runs and spread them over threads.
#pragma once

#include <cstdint>

#include "drop_hash.h"

namespace qat {

// Grid of codes. All are float32 numbers, whole for z, low and high, and at most 2^23 in magnitude for low and high.
struct Range {
  float low;
  float high;
};

// Smallest and largest finite values of a run, and how many values were nan or infinite.
struct Extrema {
  float low;
  float high;
  int64_t nonfinite;
};

// bfloat16 values travel as their bit patterns.
template <class T>
struct TypedKernels {
  // y[i] = dequantize(quantize(x[i])), and bit i of `bits` (least significant first) tells that the code was not
  // clamped. `bits` may be null; whole bytes are written, so two runs must not share one. n may be anything.
  void (*quantize_run)(const T* x, T* y, uint8_t* bits, int64_t n, float scale, float zero_point, Range range);
  // The same with one scale and zero point for each element.
  void (*quantize_each)(const T* x, T* y, uint8_t* bits, int64_t n, const float* scale, const float* zero_point,
                        Range range);
  // out[i] = bit i ? grad[i] : 0; out may be grad.
  void (*mask_run)(const T* grad, const uint8_t* bits, T* out, int64_t n);
  // Widens `extrema` by the run.
  void (*extrema_run)(const T* x, int64_t n, Extrema* extrema);
  // Widens low[i] and high[i] by x[i], and counts into *nonfinite.
  void (*extrema_each)(const T* x, int64_t n, float* low, float* high, int64_t* nonfinite);
  // Widens `extrema`, and writes the upper bits of the float32 patterns (shifted right by `shift`) of the elements that
  // are not +0.0, in order; returns how many. `bins` has room for n + 16.
  int64_t (*bins_run)(const T* x, int64_t n, int shift, uint32_t* bins, Extrema* extrema);
  // out[i] = x[i] * factor[i], and out[i] = x[i] / factor[i]; out may be x where the types are equal.
  void (*multiply_each)(const T* x, const float* factor, float* out, int64_t n);
  void (*divide_each)(const float* x, const float* factor, T* out, int64_t n);
  // The steps of multiply_each, quantize_run and divide_each, on one factor.
  void (*weight_run)(const T* x, T* y, uint8_t* bits, int64_t n, float factor, float scale, float zero_point,
                     Range range);
  // Gradients of a fake quantization: dx[i] that of x; ds[i] and dz[i] (may be null) what the element adds to those of the
  // scale and of the zero point. dx may be grad. `clips`: those of a learned clip (PACT) instead.
  void (*learned_run)(const T* grad, const T* x, T* dx, float* ds, float* dz, int64_t n, float scale, float zero_point,
                      Range range, bool clips);
  void (*learned_each)(const T* grad, const T* x, T* dx, float* ds, float* dz, int64_t n, const float* scale,
                       const float* zero_point, Range range, bool clips);
  // The same of weight_run, where ds[i] and dz[i] are still to be divided by the factor.
  void (*weight_learned_run)(const T* grad, const T* w, T* dw, float* ds, float* dz, int64_t n, float factor,
                             float scale, float zero_point, Range range);
};

// Steps of a pass of norm.h: clamp to [low, high], then fake-quantize if `quantize`; gradients are those of a learned clip if
// `clips`.
struct NormSteps {
  float low, high;
  bool quantize;
  float scale, zero_point;
  Range codes;
  bool clips = false;
};

struct NormKernels {
  // y[i] = steps of x[i] * factor + shift, and bit i of `bits` (may be null) that it lies strictly inside the bounds and the
  // codes; y may be x.
  void (*norm_run)(const float* x, float* y, uint8_t* bits, int64_t n, float factor, float shift,
                   const NormSteps& steps);
  void (*norm_each)(const float* x, float* y, uint8_t* bits, int64_t n, const float* factor, const float* shift,
                    const NormSteps& steps);
  // Adds to the sums and sums of squares and widens the extrema: of every column of (rows, channels), and of one run.
  void (*moments_rows)(const float* x, int64_t rows, int64_t channels, double* sum, double* square, float* low,
                       float* high);
  void (*moments_run)(const float* x, int64_t n, double* sum, double* square, float* low, float* high);
  // Adds g and g * x.
  void (*products_rows)(const float* g, const float* x, int64_t rows, int64_t channels, double* sum, double* product);
  void (*products_run)(const float* g, const float* x, int64_t n, double* sum, double* product);
  // dx[i] = g[i] * factor + ((x[i] - center) * slope + offset)
  void (*gradient_run)(const float* g, const float* x, float* dx, int64_t n, float factor, float slope, float center,
                       float offset);
  void (*gradient_each)(const float* g, const float* x, float* dx, int64_t n, const float* factor, const float* slope,
                        const float* center, const float* offset);
  void (*add_run)(const float* x, const float* other, float* y, int64_t n);
  // Of steps that quantize: dx[i] = g[i] where norm_run sets the bit, else 0; ds[i] and dz[i] (may be null) what the
  // element adds to the gradients of scale and zero point. dx may be g.
  void (*learned_run)(const float* g, const float* x, float* dx, float* ds, float* dz, int64_t n, float factor,
                      float shift, const NormSteps& steps);
  void (*learned_each)(const float* g, const float* x, float* dx, float* ds, float* dz, int64_t n, const float* factor,
                       const float* shift, const NormSteps& steps);
};

// QDrop: numbers by place (drop_hash.h), and elements that keep their value where the number is below a threshold.
struct DropKernels {
  // out[i] = the number of the place first + i, of which the upper 32 bits do not change.
  void (*place_numbers)(DropKey key, int64_t first, float* out, int64_t n);
  // Where it is below: y[i] = kept[i], and bit i of `bits` (may be null) that of `kept_bits`.
  void (*keep_run)(const float* numbers, float threshold, const float* kept, const uint8_t* kept_bits, float* y,
                   uint8_t* bits, int64_t n);
};

// y[i] = tanh(x[i]) * ratio, and dx[i] = grad[i] * ratio * (1 - tanh(x[i])^2).
struct TanhKernels {
  void (*run)(const float* x, float* y, int64_t n, float ratio);
  void (*gradient_run)(const float* grad, const float* x, float* dx, int64_t n, float ratio);
};

// What is remembered of the codes of a weight, element by element (qat/train/oscillation_step.py).
struct OscillationState {
  int16_t* codes;
  int8_t* direction;
  float* average;
  float* frequency;
  bool* frozen;
  float* held;
};

// `freezes`: a frequency above the threshold freezes, but at the ends of the codes if `spares_ends`. `by_value`: what is
// held is the weight and not its code.
struct OscillationRule {
  float momentum;
  bool freezes;
  float threshold;
  bool spares_ends;
  bool by_value;
};

// Takes in a run of a weight on one grid, and writes what is frozen: steps of `scale` for weight[i] * factor.
struct OscillationKernels {
  void (*run)(float* weight, const OscillationState& state, int64_t n, float factor, float scale, float zero_point,
              Range range, const OscillationRule& rule);
};

struct Kernels {
  const char* isa;
  // The sum of x in an order that only n decides, and sum[i] += x[i].
  double (*sum_run)(const float* x, int64_t n);
  void (*sum_each)(const float* x, int64_t n, double* sum);
  // The sum of jumps[i] F(points[i]), F the primitive of the squared error of a grid with zero on it, a step of `scale` and
  // the codes [low, high] around zero; in an order that only n decides (qat/observers/clipping.py).
  double (*clip_error)(const double* points, const double* jumps, int64_t n, double scale, double low, double high);
  TypedKernels<float> f32;
  TypedKernels<uint16_t> bf16;
  NormKernels norm;
  DropKernels drop;
  TanhKernels tanh;
  OscillationKernels oscillation;
};

// One for each source file; null where the file was not compiled for this architecture.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// The table of an instruction set by its name ("portable", "avx2", "avx512", "neon"), null where the name is unknown or this
// processor or its operating system lacks it. An empty name is the best one.
const Kernels* find_kernels(const char* isa);

}  // namespace qat
