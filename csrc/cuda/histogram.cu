// Histogram by the upper 16 bits of the float32 pattern: sign, exponent, seven bits of the mantissa.
#include "bins.h"
#include "device.cuh"
#include "launch.h"

namespace qat::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(1024)
    histogram(const T* x, int64_t n, bool aligned, int64_t* counts, ExtremaOut extrema) {
  __shared__ uint32_t table[private_bins];  // a block counts less than 2^32 elements
  for (int b = threadIdx.x; b < private_bins; b += blockDim.x) table[b] = 0;
  __syncthreads();
  Extrema own;
  own.clear();
  uint32_t zeros = 0;
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<T> v;
    load(v, x + start, count, aligned);
#pragma unroll
    for (int i = 0; i < octet; ++i) {
      if (i >= count) continue;
      const float value = to_float(v.value[i]);
      own.add(value);
      if (!is_finite(value)) continue;
      const uint32_t bin = bits_of(value) >> 16;
      const int slot = private_bin(bin);
      if (bin == 0) ++zeros;  // half of what a ReLU leaves: all threads would queue for one counter
      else if (slot >= 0) atomicAdd(table + slot, 1u);
      else atomicAdd(reinterpret_cast<unsigned long long*>(counts + bin), 1ull);
    }
  }
  count_into(counts, zeros);
  count_into(extrema.nonfinite, own.nonfinite);
  const float low = warp_low(own.low), high = warp_high(own.high);
  if (threadIdx.x % 32 == 0 && low <= high) {
    atomic_low(extrema.low, low);
    atomic_high(extrema.high, high);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < private_bins; b += blockDim.x) {
    if (table[b] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counts + public_bin(b)), table[b]);
  }
}

}  // namespace

template <class T>
cudaError_t observe_histogram(const T* x, int64_t n, int64_t* counts, ExtremaOut extrema, cudaStream_t stream) {
  // few large blocks: each adds its table to the counts once
  const int blocks = blocks_for((n + octet - 1) / octet / 4 + 1, 2);
  histogram<<<blocks, 1024, 0, stream>>>(x, n, is_aligned(x), counts, extrema);
  return cudaGetLastError();
}

template cudaError_t observe_histogram(const float*, int64_t, int64_t*, ExtremaOut, cudaStream_t);
template cudaError_t observe_histogram(const uint16_t*, int64_t, int64_t*, ExtremaOut, cudaStream_t);

}  // namespace qat::cuda
