// Passes without channels: the numbers by which QDrop chooses elements, and DoReFa's weights.
#include "../kernels/tanh_terms.h"
#include "affine.h"
#include "device.cuh"
#include "launch.h"

namespace qat::cuda {
namespace {

__global__ void numbers(int64_t seed, float* out, int64_t n) {
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) {
    out[at] = place_number(drop_key(seed, at), static_cast<uint32_t>(at));
  }
}

// The operations of csrc/kernels/drop_loops.h, in their order.
__device__ float tangent(float x) {
  if (is_nan(x)) return x;
  const float held = smaller(larger(x, -tanh_bound), tanh_bound), square = held * held;
  float above = tanh_above(tanh_degree), below = tanh_below(tanh_degree);
#pragma unroll
  for (int k = tanh_degree - 1; k >= 0; --k) {
    above = above * square + tanh_above(k);
    below = below * square + tanh_below(k);
  }
  return smaller(larger(divide(held * above, below), -1.0f), 1.0f);
}

// One warp.
__global__ void set_ratio(const float* low, const float* high, float* ratio) {
  if (threadIdx.x != 0) return;
  const float below = 0.0f - *low, largest = *high >= below ? *high : below;
  *ratio = largest > 0.0f ? divide(largest, tangent(largest)) : 1.0f;
}

__global__ void transform(const float* w, float* y, int64_t n, const float* ratio) {
  const float r = *ratio;
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) y[at] = tangent(w[at]) * r;
}

__global__ void slope(const float* grad, const float* w, const float* ratio, float* dw, int64_t n) {
  const float r = *ratio;
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) {
    const float t = tangent(w[at]);
    dw[at] = grad[at] * r * (1.0f - t * t);
  }
}

}  // namespace

cudaError_t place_numbers(int64_t seed, float* out, int64_t n, cudaStream_t stream) {
  numbers<<<blocks_for(n), threads_per_block, 0, stream>>>(seed, out, n);
  return cudaGetLastError();
}

cudaError_t tanh_weight(const float* w, float* y, int64_t n, const float* low, const float* high, float* ratio,
                        cudaStream_t stream) {
  set_ratio<<<1, 32, 0, stream>>>(low, high, ratio);
  transform<<<blocks_for(n), threads_per_block, 0, stream>>>(w, y, n, ratio);
  return cudaGetLastError();
}

cudaError_t tanh_weight_gradient(const float* grad, const float* w, const float* ratio, float* dw, int64_t n,
                                 cudaStream_t stream) {
  slope<<<blocks_for(n), threads_per_block, 0, stream>>>(grad, w, ratio, dw, n);
  return cudaGetLastError();
}

}  // namespace qat::cuda
