// Fake quantization of eight elements: what one thread does at a time, one byte of the mask.
#pragma once

#include "../kernels/ranges.h"
#include "host_device.h"

namespace qat::cuda {

constexpr int octet = 8;

template <class T>
struct alignas(octet * sizeof(T)) Octet {
  T value[octet];
};

struct Quantized {
  float value;
  bool inside;
};

// The contract of docs/numerics.md: float32 division, half to even, nan has the code of zero, infinities saturate.
QAT_HD Quantized fake_quantize(float x, float scale, float zero_point, Range range) {
  const float steps = round_even(divide(x, scale));
  const bool number = !is_nan(steps);
  const float code = (number ? steps : 0.0f) + zero_point;
  const float clamped = smaller(larger(code, range.low), range.high);
  return {(clamped - zero_point) * scale, number && code == clamped};
}

// Where the elements behind a first one lie, without a division for each.
template <class Index>
struct Channel {
  Index channels, inner, channel, rest;

  QAT_HD Channel(Index first, Index channels_, Index inner_)
      : channels(channels_), inner(inner_), channel((first / inner_) % channels_), rest(inner_ - first % inner_) {}

  QAT_HD void next() {
    if (--rest > 0) return;
    rest = inner;
    if (++channel == channels) channel = 0;
  }
};

// Smallest and largest finite value, -0 taken for +0, and how many values were not finite.
struct Extrema {
  float low, high;
  uint32_t nonfinite;

  QAT_HD void clear() {
    low = infinity();
    high = -infinity();
    nonfinite = 0;
  }
  QAT_HD void add(float x) {
    if (!is_finite(x)) {
      ++nonfinite;
      return;
    }
    const float v = x + 0.0f;
    low = smaller(low, v);
    high = larger(high, v);
  }
};

// Calls flush(channel, low, high) for each run of one channel among `count` elements from element `first` on.
template <class Index, class T, class Flush>
QAT_HD void observe_octet(const Octet<T>& x, int count, Channel<Index> at, uint32_t& nonfinite, Flush flush) {
  Extrema run;
  run.clear();
  Index channel = at.channel;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) {  // a run-time bound would move x to local memory
    if (i >= count) break;
    if (at.channel != channel) {
      flush(channel, run.low, run.high);
      nonfinite += run.nonfinite;
      run.clear();
      channel = at.channel;
    }
    run.add(to_float(x.value[i]));
    at.next();
  }
  flush(channel, run.low, run.high);
  nonfinite += run.nonfinite;
}

// Quantizes `count` elements in place and returns their bits.
template <bool per_channel, class Index, class T>
QAT_HD uint8_t quantize_octet(Octet<T>& x, int count, Channel<Index> at, const float* scale, const float* zero_point,
                              Range range) {
  uint32_t bits = 0;
  float s = scale[per_channel ? at.channel : 0], z = zero_point[per_channel ? at.channel : 0];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) {
    if (i >= count) break;
    const Quantized q = fake_quantize(to_float(x.value[i]), s, z, range);
    from_float(q.value, x.value[i]);
    bits |= static_cast<uint32_t>(q.inside) << i;
    if (per_channel) {
      const Index before = at.channel;
      at.next();
      if (at.channel != before && i + 1 < count) {
        s = scale[at.channel];
        z = zero_point[at.channel];
      }
    }
  }
  return static_cast<uint8_t>(bits);
}

template <class T>
QAT_HD void mask_octet(Octet<T>& grad, uint8_t bits) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < octet; ++i) grad.value[i] = (bits >> i) & 1 ? grad.value[i] : T(0);
}

}  // namespace qat::cuda
