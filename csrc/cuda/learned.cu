// Gradients of a learned grid: of x through the range mask, of scale and zero point by a reduction of fixed order.
#include "launch.h"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

template <class T>
struct LearnedTerms {
  const T *x, *grad;
  T* dx;
  const float *scale, *zero_point;
  Range range;

  __device__ Pair operator()(int64_t channel, int64_t at) const {
    const float value = to_float(x[at]), s = scale[channel], z = zero_point[channel];
    const T g = grad[at];
    dx[at] = fake_quantize(value, s, z, range).inside ? g : T(0);  // every element is visited once
    return learned_terms(value, to_float(g), s, z, range);
  }
};

struct LearnedFinish {
  float *dscale, *dzero_point;
  __device__ void operator()(int64_t channel, double first, double second) const {
    dscale[channel] = static_cast<float>(first);
    dzero_point[channel] = static_cast<float>(second);
  }
};

}  // namespace

int64_t reduction_scratch(Layout layout) { return 2 * splits_of(layout) * layout.channels; }

template <class T>
cudaError_t learned_backward(const T* x, const T* grad, T* dx, Layout layout, const float* scale,
                             const float* zero_point, Range range, float* dscale, float* dzero_point, float* scratch,
                             cudaStream_t stream) {
  return reduce_channels(LearnedTerms<T>{x, grad, dx, scale, zero_point, range}, LearnedFinish{dscale, dzero_point},
                         layout, scratch, stream);
}

template cudaError_t learned_backward(const float*, const float*, float*, Layout, const float*, const float*, Range,
                                      float*, float*, float*, cudaStream_t);
template cudaError_t learned_backward(const uint16_t*, const uint16_t*, uint16_t*, Layout, const float*, const float*,
                                      Range, float*, float*, float*, cudaStream_t);

}  // namespace qat::cuda
