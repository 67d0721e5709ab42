// Histograms by the upper bits of the float32 patterns, of a tensor or by channel; of a tensor also in the pass that
// fake-quantizes it.
#include "bins.h"
#include "launch.h"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

constexpr int counting_threads = 1024;

// A block's counters, which it adds to those of device memory once.
class Table {
 public:
  __device__ Table(uint32_t* counters, const Bins& bins) : counters_(counters), bins_(bins) {
    for (int b = threadIdx.x; b < 2 * bins_.half; b += blockDim.x) counters_[b] = 0;
    __syncthreads();
  }

  // A block counts less than 2^32 elements.
  __device__ void count(float x, int64_t* counts) {
    if (!is_finite(x)) return;
    const uint32_t bin = bins_.of(x);
    const int slot = bins_.slot(bin);
    // +0, half of what a ReLU leaves: all threads would queue for one counter
    if (bits_of(x) == 0) ++zeros_;
    else if (slot >= 0) atomicAdd(counters_ + slot, 1u);
    else atomicAdd(reinterpret_cast<unsigned long long*>(counts + bin), 1ull);
  }

  __device__ void add_to(int64_t* counts) {
    count_into(counts, zeros_);
    __syncthreads();
    for (int b = threadIdx.x; b < 2 * bins_.half; b += blockDim.x) {
      if (counters_[b] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counts + bins_.bin(b)), counters_[b]);
    }
  }

 private:
  uint32_t* counters_;
  Bins bins_;
  uint32_t zeros_ = 0;
};

// What a pass writes that also fake-quantizes, and on which grid; `bits` may be null.
template <class T>
struct Target {
  T* y;
  uint8_t* bits;
  const float *scale, *zero_point;
  Range range;
};

template <bool quantize, class T>
__global__ void __launch_bounds__(counting_threads)
    one_channel(const T* x, const Target<T> to, int64_t n, bool aligned, Bins bins, int64_t* counts,
                ExtremaOut extrema) {
  __shared__ uint32_t counters[private_bins];
  Table table(counters, bins);
  Extrema own;
  own.clear();
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = thread_of_grid(); o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<T> v;
    load(v, x + start, count, aligned);
#pragma unroll
    for (int i = 0; i < octet; ++i) {
      if (i >= count) continue;
      const float value = to_float(v.value[i]);
      own.add(value);
      table.count(value, counts);
    }
    if (quantize) {
      const Channel<int64_t> single(0, 1, n);
      const uint8_t bits = quantize_octet<false>(v, count, single, to.scale, to.zero_point, to.range);
      store(to.y + start, v, count, aligned);
      if (to.bits != nullptr) to.bits[o] = bits;
    }
  }
  table.add_to(counts);
  count_into(extrema.nonfinite, own.nonfinite);
  widen_one(extrema, own);
}

// Block (channel, split); the splits of a channel share its counters in device memory.
template <class T>
__global__ void __launch_bounds__(counting_threads)
    by_channel(const T* x, Layout layout, int64_t part, Bins bins, int64_t* counts, ExtremaOut extrema) {
  __shared__ uint32_t counters[private_bins];
  Table table(counters, bins);
  Extrema own;
  own.clear();
  const int64_t channel = blockIdx.x, first = blockIdx.y * part, positions = layout.outer * layout.inner;
  const int64_t end = first + part < positions ? first + part : positions, begin = first + threadIdx.x;
  counts += channel * bins.count();
  Walk walk(layout, channel, begin, blockDim.x);
  for (int64_t p = begin; p < end; p += blockDim.x) {
    const float value = to_float(x[walk.at]);
    own.add(value);
    table.count(value, counts);
    walk.next();
  }
  table.add_to(counts);
  count_into(extrema.nonfinite, own.nonfinite);
  widen_one({extrema.low + channel, extrema.high + channel, nullptr}, own);
}

template <bool quantize, class T>
cudaError_t count_one(const T* x, const Target<T>& to, int64_t n, const HistogramOut& out, cudaStream_t stream) {
  // few large blocks: each adds its table to the counts once
  const int blocks = blocks_for((n + octet - 1) / octet / 4 + 1, 2);
  const bool aligned = is_aligned(x) && is_aligned(to.y);
  one_channel<quantize><<<blocks, counting_threads, 0, stream>>>(x, to, n, aligned, Bins(out.mantissa_bits), out.counts,
                                                                 out.extrema);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t observe_histogram(const T* x, Layout layout, const HistogramOut& out, cudaStream_t stream) {
  const Bins bins(out.mantissa_bits);
  const int64_t positions = layout.outer * layout.inner;
  if (layout.channels == 1) return count_one<false>(x, Target<T>{}, positions, out, stream);
  const int64_t splits = splits_of(layout), part = (positions + splits - 1) / splits;
  const dim3 blocks(static_cast<unsigned>(layout.channels), static_cast<unsigned>(splits));
  by_channel<<<blocks, counting_threads, 0, stream>>>(x, layout, part, bins, out.counts, out.extrema);
  return cudaGetLastError();
}

template <class T>
cudaError_t fake_quantize_observe(const T* x, T* y, uint8_t* bits, Layout layout, const float* scale,
                                  const float* zero_point, Range range, const HistogramOut& out, cudaStream_t stream) {
  const auto quantize = [&](const ExtremaOut& extrema) {
    return fake_quantize(x, y, bits, layout, scale, zero_point, range, extrema, stream);
  };
  if (out.counts == nullptr) return quantize(out.extrema);
  if (layout.channels == 1) {
    const Target<T> to{y, bits, scale, zero_point, range};
    return count_one<true>(x, to, layout.outer * layout.inner, out, stream);
  }
  // a block that counts has one channel, element by element: it would store narrowly, and share bytes of the mask
  const cudaError_t counted = observe_histogram(x, layout, out, stream);
  return counted == cudaSuccess ? quantize({}) : counted;
}

#define QAT_INSTANTIATE(T)                                                                                       \
  template cudaError_t observe_histogram(const T*, Layout, const HistogramOut&, cudaStream_t);                   \
  template cudaError_t fake_quantize_observe(const T*, T*, uint8_t*, Layout, const float*, const float*, Range,  \
                                             const HistogramOut&, cudaStream_t);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)

}  // namespace qat::cuda
