// Histograms by the upper bits of the float32 patterns, of a tensor or by channel.
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

template <class T>
__global__ void __launch_bounds__(counting_threads)
    one_channel(const T* x, int64_t n, bool aligned, Bins bins, int64_t* counts, ExtremaOut extrema) {
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

}  // namespace

template <class T>
cudaError_t observe_histogram(const T* x, Layout layout, const HistogramOut& out, cudaStream_t stream) {
  const Bins bins(out.mantissa_bits);
  const int64_t positions = layout.outer * layout.inner;
  if (layout.channels == 1) {
    // few large blocks: each adds its table to the counts once
    const int blocks = blocks_for((positions + octet - 1) / octet / 4 + 1, 2);
    one_channel<<<blocks, counting_threads, 0, stream>>>(x, positions, is_aligned(x), bins, out.counts, out.extrema);
    return cudaGetLastError();
  }
  const int64_t splits = splits_of(layout), part = (positions + splits - 1) / splits;
  const dim3 blocks(static_cast<unsigned>(layout.channels), static_cast<unsigned>(splits));
  by_channel<<<blocks, counting_threads, 0, stream>>>(x, layout, part, bins, out.counts, out.extrema);
  return cudaGetLastError();
}

template cudaError_t observe_histogram(const float*, Layout, const HistogramOut&, cudaStream_t);
template cudaError_t observe_histogram(const uint16_t*, Layout, const HistogramOut&, cudaStream_t);

}  // namespace qat::cuda
