// Learned grids: the codes of zero points, and the gradients: of x through the range mask, of the grid by a reduction.
#include "grid_sums.cuh"
#include "launch.h"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

template <class T>
struct Terms {
  using Sum = Pair;
  const T *x, *grad;
  T* dx;
  const float *scale, *zero_point;
  Range range;
  bool clips;

  __device__ void add(Pair& own, int64_t channel, int64_t at) const {
    const T g = grad[at];
    const LearnedTerms t = grid_terms(to_float(x[at]), to_float(g), scale[channel], zero_point[channel], range, clips);
    dx[at] = t.inside ? g : T(0);  // every element is visited once
    own.add(t.scale, t.zero_point);
  }
};

template <class T>
struct WeightTerms {
  using Sum = Pair;
  const T *w, *grad;
  T* dw;
  const float *scale, *zero_point;
  Range range;
  Factors factor;

  __device__ void add(Pair& own, int64_t channel, int64_t at) const {
    const T g = grad[at];
    const float f = factor(at);
    const LearnedTerms t = learned_terms(to_float(w[at]) * f, to_float(g), scale[channel], zero_point[channel], range);
    dw[at] = t.inside ? g : T(0);  // every element is visited once
    own.add(divide(t.scale, f), divide(t.zero_point, f));
  }
};

__global__ void round_codes(const float* zero_point, int64_t count, Range range, float* codes) {
  const int64_t i = thread_of_grid();
  if (i < count) codes[i] = nearest_code(zero_point[i], range);
}

}  // namespace

int64_t reduction_scratch(Layout layout) {
  return splits_of(layout) * layout.channels * static_cast<int64_t>(sizeof(Quad));  // the largest sum
}

cudaError_t nearest_codes(const float* zero_point, int64_t count, Range range, float* codes, cudaStream_t stream) {
  round_codes<<<blocks_of_each(count), threads_per_block, 0, stream>>>(zero_point, count, range, codes);
  return cudaGetLastError();
}

template <class T>
cudaError_t learned_backward(const T* x, const T* grad, T* dx, Layout layout, const float* scale,
                             const float* zero_point, Range range, bool clips, double grad_scale, float* dscale,
                             float* dzero_point, void* scratch, cudaStream_t stream) {
  return reduce_channels(Terms<T>{x, grad, dx, scale, zero_point, range, clips}, FinishGrid{grad_scale, dscale, dzero_point},
                         layout, scratch, stream);
}

template <class T>
cudaError_t learned_weight_backward(const T* w, const T* grad, T* dw, Layout layout, const float* scale,
                                    const float* zero_point, Range range, const Factors& f, double grad_scale,
                                    float* dscale, float* dzero_point, void* scratch, cudaStream_t stream) {
  return reduce_channels(WeightTerms<T>{w, grad, dw, scale, zero_point, range, f},
                         FinishGrid{grad_scale, dscale, dzero_point}, layout, scratch, stream);
}

#define QAT_INSTANTIATE(T)                                                                                         \
  template cudaError_t learned_backward(const T*, const T*, T*, Layout, const float*, const float*, Range, bool,   \
                                        double, float*, float*, void*, cudaStream_t);                              \
  template cudaError_t learned_weight_backward(const T*, const T*, T*, Layout, const float*, const float*, Range,  \
                                               const Factors&, double, float*, float*, void*, cudaStream_t);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)

}  // namespace qat::cuda
