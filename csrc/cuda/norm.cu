// Batch norm, activation, residual addition, observation and fake quantization: two passes forward, two backward.
#include "launch.h"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

// Sums of the differences to the channel's first element: the variance does not cancel.
template <class T>
struct StatisticsTerms {
  const T* x;
  int64_t inner;
  __device__ Pair operator()(int64_t channel, int64_t at) const {
    const float d = to_float(x[at]) - to_float(x[channel * inner]);
    return {d, d * d};
  }
};

template <class T>
struct StatisticsFinish {
  const T* x;
  int64_t inner;
  double count;
  float *mean, *variance;
  __device__ void operator()(int64_t channel, double first, double second) const {
    const double shift = first / count;
    mean[channel] = static_cast<float>(to_float(x[channel * inner]) + shift);
    const double v = second / count - shift * shift;
    variance[channel] = static_cast<float>(v < 0 ? 0.0 : v);
  }
};

template <class T>
struct BackwardTerms {
  const T *x, *grad;
  const uint8_t* bits;
  Norm norm;
  __device__ Pair operator()(int64_t channel, int64_t at) const {
    if (!((bits[at / 8] >> (at % 8)) & 1)) return {0.0f, 0.0f};
    const float g = to_float(grad[at]);
    return {g, g * normalized(to_float(x[at]), norm.mean[channel], norm.inverse[channel])};
  }
};

struct BackwardFinish {
  float *dgamma, *dbeta;
  __device__ void operator()(int64_t channel, double first, double second) const {
    dbeta[channel] = static_cast<float>(first);
    dgamma[channel] = static_cast<float>(second);
  }
};

__global__ void invert(const float* variance, float epsilon, int64_t channels, float* inverse) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c < channels) inverse[c] = divide(1.0f, __fsqrt_rn(variance[c] + epsilon));
}

template <class T>
struct Apply {
  const T *x, *residual;
  T* y;
  uint8_t* bits;
  Norm norm;
  int activation;
  const float *scale, *zero_point;
  Range range;
  ExtremaOut extrema;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(threads_per_block) apply(const Apply<T> p, int64_t n, int64_t channels, int64_t inner) {
  Extrema own;
  own.clear();
  const bool quantize = p.scale != nullptr;
  const float s = quantize ? *p.scale : 1.0f, z = quantize ? *p.zero_point : 0.0f;
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<T> x, other{};
    load(x, p.x + start, count, p.aligned);
    if (p.residual != nullptr) load(other, p.residual + start, count, p.aligned);
    Channel<int64_t> at(start, channels, inner);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < octet; ++i) {
      if (i >= count) break;
      const int64_t c = at.channel;
      float v = fused(normalized(to_float(x.value[i]), p.norm.mean[c], p.norm.inverse[c]), p.norm.gamma[c],
                      p.norm.beta[c]);
      if (p.residual != nullptr) v += to_float(other.value[i]);
      bool passes;
      v = activate(v, p.activation, passes);
      own.add(v);
      if (quantize) {
        const Quantized q = fake_quantize(v, s, z, p.range);
        v = q.value;
        passes = passes && q.inside;
      }
      from_float(v, x.value[i]);
      bits |= static_cast<uint32_t>(passes) << i;
      at.next();
    }
    store(p.y + start, x, count, p.aligned);
    if (p.bits != nullptr) p.bits[o] = static_cast<uint8_t>(bits);
  }
  if (p.extrema.low == nullptr) return;
  count_into(p.extrema.nonfinite, own.nonfinite);
  const float low = warp_low(own.low), high = warp_high(own.high);
  if (threadIdx.x % 32 != 0 || low > high) return;
  atomic_low(p.extrema.low, low);
  atomic_high(p.extrema.high, high);
}

template <class T>
struct Backward {
  const T *x, *grad;
  const uint8_t* bits;
  Norm norm;
  bool frozen;
  const float *dgamma, *dbeta;
  float count;
  T *dx, *dresidual;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(threads_per_block)
    backward(const Backward<T> p, int64_t n, int64_t channels, int64_t inner) {
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<T> x, grad;
    load(x, p.x + start, count, p.aligned);
    load(grad, p.grad + start, count, p.aligned);
    mask_octet(grad, p.bits[o]);
    if (p.dresidual != nullptr) store(p.dresidual + start, grad, count, p.aligned);
    Channel<int64_t> at(start, channels, inner);
#pragma unroll
    for (int i = 0; i < octet; ++i) {
      if (i >= count) break;
      const int64_t c = at.channel;
      const float inverse = p.norm.inverse[c];
      const float nx = normalized(to_float(x.value[i]), p.norm.mean[c], inverse);
      from_float(norm_gradient(to_float(grad.value[i]), nx, p.norm.gamma[c] * inverse, p.dbeta[c], p.dgamma[c],
                               p.count, p.frozen),
                 x.value[i]);
      at.next();
    }
    store(p.dx + start, x, count, p.aligned);
  }
}

int64_t size(Layout layout) { return layout.outer * layout.channels * layout.inner; }

}  // namespace

cudaError_t inverse_deviation(const float* variance, float epsilon, int64_t channels, float* inverse,
                              cudaStream_t stream) {
  invert<<<static_cast<unsigned>((channels + 255) / 256), 256, 0, stream>>>(variance, epsilon, channels, inverse);
  return cudaGetLastError();
}

template <class T>
cudaError_t batch_statistics(const T* x, Layout layout, float* mean, float* variance, float* scratch,
                             cudaStream_t stream) {
  const auto count = static_cast<double>(layout.outer * layout.inner);
  return reduce_channels(StatisticsTerms<T>{x, layout.inner},
                         StatisticsFinish<T>{x, layout.inner, count, mean, variance}, layout, scratch, stream);
}

template <class T>
cudaError_t norm_apply(const T* x, const T* residual, T* y, uint8_t* bits, Layout layout, Norm norm,
                       Activation activation, const float* scale, const float* zero_point, Range range,
                       ExtremaOut extrema, cudaStream_t stream) {
  const bool aligned = is_aligned(x) && is_aligned(y) && (residual == nullptr || is_aligned(residual));
  const Apply<T> p{x, residual, y, bits, norm, static_cast<int>(activation), scale, zero_point, range, extrema, aligned};
  const int64_t n = size(layout);
  apply<<<blocks_for((n + octet - 1) / octet), threads_per_block, 0, stream>>>(p, n, layout.channels, layout.inner);
  return cudaGetLastError();
}

template <class T>
cudaError_t norm_backward(const T* x, const T* grad, const uint8_t* bits, Layout layout, Norm norm, bool frozen, T* dx,
                          T* dresidual, float* dgamma, float* dbeta, float* scratch, cudaStream_t stream) {
  const cudaError_t error = reduce_channels(BackwardTerms<T>{x, grad, bits, norm}, BackwardFinish{dgamma, dbeta},
                                            layout, scratch, stream);
  if (error != cudaSuccess) return error;
  const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(dx) &&
                       (dresidual == nullptr || is_aligned(dresidual));
  const Backward<T> p{x, grad, bits, norm, frozen, dgamma, dbeta, static_cast<float>(layout.outer * layout.inner),
                      dx, dresidual, aligned};
  const int64_t n = size(layout);
  backward<<<blocks_for((n + octet - 1) / octet), threads_per_block, 0, stream>>>(p, n, layout.channels, layout.inner);
  return cudaGetLastError();
}

#define QAT_INSTANTIATE(T)                                                                                             \
  template cudaError_t batch_statistics(const T*, Layout, float*, float*, float*, cudaStream_t);                       \
  template cudaError_t norm_apply(const T*, const T*, T*, uint8_t*, Layout, Norm, Activation, const float*,            \
                                  const float*, Range, ExtremaOut, cudaStream_t);                                      \
  template cudaError_t norm_backward(const T*, const T*, const uint8_t*, Layout, Norm, bool, T*, T*, float*, float*,   \
                                     float*, cudaStream_t);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)

}  // namespace qat::cuda
