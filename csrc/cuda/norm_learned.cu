// The backward passes of norm.cu where the grid is learned: what the activation made is computed again.
#include "grid_sums.cuh"
#include "launch.h"
#include "norm.cuh"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

__global__ void lines_of(int64_t channels, NormSlopes s, const float* beta, float* shift) {
  const int64_t c = thread_of_grid();
  if (c < channels) set_line(s.gamma, beta, s.mean, s.inverse, s.factor, shift, c);
}

struct NormTerms {
  using Sum = Quad;
  const float *x, *grad, *factor, *shift;
  StepsOnDevice steps;

  __device__ void add(Quad& own, int64_t channel, int64_t at) const {
    const float v = x[at], g = grad[at];
    const LearnedTerms t = norm_learned_terms(on_line(v, {factor[channel], shift[channel]}), g, steps_of(steps), at);
    add_product(own.products, t.inside ? g : 0.0f, v);
    own.grid.add(t.scale, t.zero_point);
  }
};

struct NormFinish {
  ProductFinish products;
  Pair* grid;
  __device__ void operator()(int64_t c, const Quad& sums) const {
    products(c, sums.products);
    grid[c] = sums.grid;
  }
};

// One block.
__global__ void __launch_bounds__(threads_per_block) total(const Pair* grid, int64_t channels, FinishGrid finish) {
  __shared__ Pair sums[threads_per_block];
  Pair own;
  own.clear();
  for (int64_t c = threadIdx.x; c < channels; c += threads_per_block) own.merge(grid[c]);
  fold_block<1>(sums, own);
  if (threadIdx.x == 0) finish(0, sums[0]);
}

struct SumTerms {
  using Sum = Pair;
  const float *x, *other, *grad;
  float* dx;
  StepsOnDevice steps;

  __device__ void add(Pair& own, int64_t, int64_t at) const {
    const float g = grad[at];
    const LearnedTerms t = norm_learned_terms((x[at] + other[at]) + 0.0f, g, steps_of(steps), at);
    dx[at] = t.inside ? g : 0.0f;  // every element is visited once
    own.add(t.scale, t.zero_point);
  }
};

}  // namespace

cudaError_t norm_learned_backward(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                                  const NormSlopes& slopes, const float* beta, float* shift,
                                  const StepsOnDevice& steps, const GridGradient& grid, float* dx, void* scratch,
                                  cudaStream_t stream) {
  lines_of<<<blocks_of_each(layout.channels), threads_per_block, 0, stream>>>(layout.channels, slopes, beta, shift);
  const auto count = static_cast<double>(layout.outer * layout.inner);
  Pair* const sums = reinterpret_cast<Pair*>(grid.sums);
  const cudaError_t error =
      reduce_channels(NormTerms{x, grad, slopes.factor, shift, steps},
                      NormFinish{ProductFinish{count, slopes}, sums}, layout, scratch, stream);
  if (error != cudaSuccess) return error;
  total<<<1, threads_per_block, 0, stream>>>(sums, layout.channels,
                                             FinishGrid{grid.grad_scale, grid.dscale, grid.dzero_point});
  return norm_gradient(x, grad, bits, layout, slopes, dx, stream);
}

cudaError_t add_learned_backward(const float* x, const float* other, const float* grad, int64_t n,
                                 const StepsOnDevice& steps, const GridGradient& grid, float* dx, void* scratch,
                                 cudaStream_t stream) {
  return reduce_channels(SumTerms{x, other, grad, dx, steps},
                         FinishGrid{grid.grad_scale, grid.dscale, grid.dzero_point}, {1, 1, n}, scratch, stream);
}

}  // namespace qat::cuda
