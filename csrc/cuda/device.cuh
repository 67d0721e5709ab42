// Memory accesses, reductions and the size of a launch, for the kernels of memory-bound passes.
#pragma once

#include <cuda_runtime.h>

#include "elements.h"

namespace qat::cuda {

constexpr int threads_per_block = 256;

// Blocks of a grid-stride loop: enough to fill the device, no more, so that a block's fixed work is done seldom.
inline int blocks_for(int64_t work, int per_multiprocessor = 8) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t needed = (work + threads_per_block - 1) / threads_per_block;
  const int64_t most = int64_t{processors} * per_multiprocessor;
  return static_cast<int>(needed < 1 ? 1 : needed < most ? needed : most);
}

// 16 bytes an instruction where the memory is aligned so.
template <class T>
__device__ inline void load(Octet<T>& to, const T* from, int count, bool aligned) {
  if (aligned && count == octet) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
    uint4* out = reinterpret_cast<uint4*>(&to);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(to) / 16); ++i) out[i] = words[i];  // in-place passes read what they write
    return;
  }
#pragma unroll
  for (int i = 0; i < octet; ++i) to.value[i] = i < count ? from[i] : T(0);
}

template <class T>
__device__ inline void store(T* to, const Octet<T>& from, int count, bool aligned) {
  if (aligned && count == octet) {
    const uint4* words = reinterpret_cast<const uint4*>(&from);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(from) / 16); ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < octet; ++i) {
    if (i < count) to[i] = from.value[i];
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// One thread for each of `count` small tasks.
inline unsigned blocks_of_each(int64_t count) {
  return static_cast<unsigned>((count + threads_per_block - 1) / threads_per_block + (count == 0));
}

__device__ inline int64_t thread_of_grid() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// Integer atomics on the patterns: patterns of positive floats are ordered, those of negative ones the other way round.
// Exact, so the order of the threads changes nothing. `v` is neither nan nor -0.
__device__ inline void atomic_low(float* at, float v) {
  if (v >= 0.0f) atomicMin(reinterpret_cast<int*>(at), __float_as_int(v));
  else atomicMax(reinterpret_cast<unsigned*>(at), __float_as_uint(v));
}

__device__ inline void atomic_high(float* at, float v) {
  if (v >= 0.0f) atomicMax(reinterpret_cast<int*>(at), __float_as_int(v));
  else atomicMin(reinterpret_cast<unsigned*>(at), __float_as_uint(v));
}

__device__ inline float warp_low(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = smaller(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

__device__ inline float warp_high(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = larger(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

// The negative nan of all ones and the positive one of most ones win over all other patterns in the atomics above.
__device__ inline void atomic_nan(float* low, float* high) {
  atomicMax(reinterpret_cast<unsigned*>(low), 0xffffffffu);
  atomicMax(reinterpret_cast<int*>(high), 0x7fffffff);
}

// The extrema of a warp's threads, which all call, with one atomic each.
__device__ inline void widen_one(const ExtremaOut& to, const Extrema& own) {
  const float low = warp_low(own.low), high = warp_high(own.high);
  if (threadIdx.x % 32 != 0 || low > high) return;  // nothing finite
  atomic_low(to.low, low);
  atomic_high(to.high, high);
}

// One atomic a warp; every thread of the warp calls.
__device__ inline void count_into(int64_t* total, uint32_t count) {
  const uint32_t sum = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), sum);
}

}  // namespace qat::cuda
