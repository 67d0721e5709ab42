// CUDA for one processor: the blocks of a launch run one after the other, the threads of a block as fibers that take turns
// where they wait for each other. What would hang or is undefined on a GPU, because a thread does not come to a barrier,
// ends the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// The launch `<<<grid, block, shared, stream>>>`; `thread` is what each thread does.
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const std::function<void()>& thread);

// The dynamic shared memory of the block.
void* shared_memory();

void wait_for_block();

// Gives 8 bytes to the lanes of the warp, waits for all of them, and returns what each gave.
const uint64_t* exchange(uint64_t own);

template <class T>
uint64_t pack(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) {
    std::fputs("emulator: a warp operation of less than a warp\n", stderr);
    std::abort();
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait_for_block(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulator::check_mask(mask);
  return emulator::unpack<T>(emulator::exchange(emulator::pack(value))[lane % 32]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

inline int __all_sync(unsigned mask, bool own) {
  emulator::check_mask(mask);
  const uint64_t* const given = emulator::exchange(own);
  for (int lane = 0; lane < 32; ++lane) {
    if (given[lane] == 0) return 0;
  }
  return 1;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned own) {
  emulator::check_mask(mask);
  const uint64_t* const given = emulator::exchange(own);
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<unsigned>(given[lane]);
  return sum;
}

template <class T, class V>
T atomicAdd(T* at, V value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  if (value < before) *at = value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  if (value > before) *at = value;
  return before;
}

inline int __float_as_int(float x) { return emulator::unpack<int>(emulator::pack(x)); }
inline unsigned __float_as_uint(float x) { return emulator::unpack<unsigned>(emulator::pack(x)); }

// Two multiprocessors: few enough blocks that their loops go round.
constexpr int cudaDevAttrMultiProcessorCount = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
