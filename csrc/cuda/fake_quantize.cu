// Fake quantization with its mask and, in the same pass, the extrema; and the gradient.
#include "device.cuh"
#include "launch.h"

namespace qat::cuda {
namespace {

// Channels that a block can keep extrema of in shared memory (32 KiB); more go to device memory at once.
constexpr int64_t most_private_channels = 4096;

template <class T>
struct Pass {
  const T* x;
  T* y;
  uint8_t* bits;
  const float *scale, *zero_point;
  Range range;
  ExtremaOut extrema;
  bool aligned, is_private;
};

// One atomic for a warp whose lanes all hold the same channel.
template <class Index>
__device__ void widen(float* low, float* high, Index channel, float l, float h, bool uniform) {
  if (uniform) {
    l = warp_low(l);
    h = warp_high(h);
    if (threadIdx.x % 32 != 0) return;
  }
  if (l > h) return;  // nothing finite
  if (l < low[channel]) atomic_low(low + channel, l);
  if (h > high[channel]) atomic_high(high + channel, h);
}

template <bool quantize, bool observe, bool per_channel, class Index, class T>
__global__ void __launch_bounds__(threads_per_block)
    pass(const Pass<T> p, const Index n, const Index channels, const Index inner) {
  extern __shared__ float table[];
  float *low = p.extrema.low, *high = p.extrema.high;
  if (observe && per_channel && p.is_private) {
    low = table;
    high = table + channels;
    for (Index c = threadIdx.x; c < channels; c += blockDim.x) {
      low[c] = infinity();
      high[c] = -infinity();
    }
    __syncthreads();
  }
  Extrema own;
  own.clear();
  const Index octets = (n + octet - 1) / octet, step = static_cast<Index>(gridDim.x) * blockDim.x;
  // whole warps stay in the loop: lanes behind the end hold no element
  for (Index first = static_cast<Index>(blockIdx.x) * blockDim.x; first < octets; first += step) {
    const Index o = first + threadIdx.x;
    const Index start = o * octet;
    const int count = o < octets ? static_cast<int>(n - start < octet ? n - start : octet) : 0;
    Octet<T> x;
    load(x, p.x + start, count, p.aligned);
    const Channel<Index> at(per_channel ? start : 0, per_channel ? channels : 1, per_channel ? inner : n);
    if (observe && per_channel) {
      const bool single = count > 0 && at.rest >= static_cast<Index>(count);
      const Index leader = __shfl_sync(0xffffffffu, at.channel, 0);
      if (__all_sync(0xffffffffu, single && at.channel == leader)) {
        Extrema run;
        run.clear();
#pragma unroll
        for (int i = 0; i < octet; ++i) {
          if (i < count) run.add(to_float(x.value[i]));
        }
        widen(low, high, leader, run.low, run.high, true);
        own.nonfinite += run.nonfinite;
      } else if (count > 0) {
        observe_octet(x, count, at, own.nonfinite,
                      [&](Index channel, float l, float h) { widen(low, high, channel, l, h, false); });
      }
    } else if (observe) {
#pragma unroll
      for (int i = 0; i < octet; ++i) {
        if (i < count) own.add(to_float(x.value[i]));
      }
    }
    if (quantize && count > 0) {
      const uint8_t bits = quantize_octet<per_channel>(x, count, at, p.scale, p.zero_point, p.range);
      store(p.y + start, x, count, p.aligned);
      if (p.bits != nullptr) p.bits[o] = bits;
    }
  }
  if (!observe) return;
  count_into(p.extrema.nonfinite, own.nonfinite);
  if (!per_channel) {
    widen(p.extrema.low, p.extrema.high, Index{0}, own.low, own.high, true);
  } else if (p.is_private) {
    __syncthreads();
    for (Index c = threadIdx.x; c < channels; c += blockDim.x) {
      widen(p.extrema.low, p.extrema.high, c, low[c], high[c], false);
    }
  }
}

template <bool quantize, bool observe, bool per_channel, class T>
cudaError_t launch(Pass<T> p, Layout layout, cudaStream_t stream) {
  const int64_t n = layout.outer * layout.channels * layout.inner;
  p.is_private = layout.channels <= most_private_channels;
  const size_t shared = observe && per_channel && p.is_private ? 2 * sizeof(float) * layout.channels : 0;
  const int blocks = blocks_for((n + octet - 1) / octet);
  if (n < int64_t{1} << 31) {
    pass<quantize, observe, per_channel><<<blocks, threads_per_block, shared, stream>>>(
        p, static_cast<uint32_t>(n), static_cast<uint32_t>(layout.channels), static_cast<uint32_t>(layout.inner));
  } else {
    pass<quantize, observe, per_channel><<<blocks, threads_per_block, shared, stream>>>(
        p, static_cast<uint64_t>(n), static_cast<uint64_t>(layout.channels), static_cast<uint64_t>(layout.inner));
  }
  return cudaGetLastError();
}

template <bool quantize, bool observe, class T>
cudaError_t launch(const Pass<T>& p, Layout layout, cudaStream_t stream) {
  return layout.channels == 1 ? launch<quantize, observe, false>(p, layout, stream)
                              : launch<quantize, observe, true>(p, layout, stream);
}

template <class T>
__global__ void __launch_bounds__(threads_per_block)
    mask(const T* grad, const uint8_t* bits, T* out, int64_t n, bool aligned) {
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<T> g;
    load(g, grad + start, count, aligned);
    mask_octet(g, bits[o]);
    store(out + start, g, count, aligned);
  }
}

__global__ void clear(ExtremaOut extrema, int64_t channels) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c == 0) *extrema.nonfinite = 0;
  if (c >= channels) return;
  extrema.low[c] = infinity();
  extrema.high[c] = -infinity();
}

}  // namespace

cudaError_t clear_extrema(ExtremaOut extrema, int64_t channels, cudaStream_t stream) {
  clear<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(extrema, channels);
  return cudaGetLastError();
}

template <class T>
cudaError_t fake_quantize(const T* x, T* y, uint8_t* bits, Layout layout, const float* scale, const float* zero_point,
                          Range range, ExtremaOut extrema, cudaStream_t stream) {
  const Pass<T> p{x, y, bits, scale, zero_point, range, extrema, is_aligned(x) && is_aligned(y), false};
  return extrema.low == nullptr ? launch<true, false>(p, layout, stream) : launch<true, true>(p, layout, stream);
}

template <class T>
cudaError_t observe_extrema(const T* x, Layout layout, ExtremaOut extrema, cudaStream_t stream) {
  const Pass<T> p{x, nullptr, nullptr, nullptr, nullptr, {}, extrema, is_aligned(x), false};
  return launch<false, true>(p, layout, stream);
}

template <class T>
cudaError_t mask_gradient(const T* grad, const uint8_t* bits, T* out, int64_t n, cudaStream_t stream) {
  mask<<<blocks_for((n + octet - 1) / octet), threads_per_block, 0, stream>>>(grad, bits, out, n,
                                                                            is_aligned(grad) && is_aligned(out));
  return cudaGetLastError();
}

#define QAT_INSTANTIATE(T)                                                                                           \
  template cudaError_t fake_quantize(const T*, T*, uint8_t*, Layout, const float*, const float*, Range, ExtremaOut,  \
                                     cudaStream_t);                                                                  \
  template cudaError_t observe_extrema(const T*, Layout, ExtremaOut, cudaStream_t);                                  \
  template cudaError_t mask_gradient(const T*, const uint8_t*, T*, int64_t, cudaStream_t);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)

}  // namespace qat::cuda
