// What follows the extrema of a batch: moving averages, grids, and weights times the factor of a batch norm.
#include "../kernels/grid.h"
#include "average.h"
#include "device.cuh"
#include "launch.h"

namespace qat::cuda {
namespace {

__global__ void average(ExtremaOut batch, int64_t channels, double momentum, ExtremaOut to) {
  const int64_t c = thread_of_grid();
  if (c < channels) move_average(to.low[c], to.high[c], batch.low[c], batch.high[c], momentum);
  if (c == 0) *to.nonfinite += *batch.nonfinite;
}

__global__ void grids(const float* low, const float* high, int64_t channels, GridRule rule, float* scale,
                      float* zero_point) {
  const int64_t c = thread_of_grid();
  if (c >= channels) return;
  const CodeGrid made = grid::of_range(low[c], high[c], rule);
  scale[c] = made.scale;
  zero_point[c] = static_cast<float>(made.zero_point);
}

__global__ void follow(const float* low, const float* high, const int64_t* nonfinite, int64_t channels, int64_t rows,
                       Tracking t, float* zero_point) {
  const int64_t c = thread_of_grid();
  if (c == 0) *t.samples += rows;
  if (c >= channels) return;
  const bool usable = nonfinite == nullptr || *nonfinite == 0;
  grid::track(usable ? low[c] : infinity(), high[c], t.momentum, t.rule, t.state, c);
  zero_point[c] = static_cast<float>(t.state.zero_point[c]);
}

template <class T>
__global__ void __launch_bounds__(threads_per_block) include(const T* x, int64_t n, Layout layout, ExtremaOut extrema) {
  if (*extrema.nonfinite == 0) return;
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) {
    const float v = to_float(x[at]);
    if (is_finite(v)) continue;
    const int64_t c = at / layout.inner % layout.channels;
    if (is_nan(v)) atomic_nan(extrema.low + c, extrema.high + c);
    else if (v < 0.0f) atomic_low(extrema.low + c, v);
    else atomic_high(extrema.high + c, v);
  }
}

template <class T>
__global__ void __launch_bounds__(threads_per_block) fold(const T* w, int64_t n, BatchNorm f, float* out) {
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) out[at] = to_float(w[at]) * f(at);
}

__global__ void factors(BatchNorm f, int64_t channels, float* out) {
  const int64_t c = thread_of_grid();
  if (c < channels) out[c] = f.of_channel(c);
}

template <class T>
__global__ void __launch_bounds__(threads_per_block) unfold(const float* folded, int64_t n, BatchNorm f, T* y) {
  for (int64_t at = thread_of_grid(); at < n; at += int64_t{gridDim.x} * blockDim.x) {
    from_float(divide(folded[at], f(at)), y[at]);
  }
}

}  // namespace

cudaError_t move_averages(ExtremaOut batch, int64_t channels, double momentum, ExtremaOut to, cudaStream_t stream) {
  average<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(batch, channels, momentum, to);
  return cudaGetLastError();
}

cudaError_t set_grids(const float* low, const float* high, int64_t channels, const GridRule& rule, float* scale,
                      float* zero_point, cudaStream_t stream) {
  grids<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(low, high, channels, rule, scale, zero_point);
  return cudaGetLastError();
}

cudaError_t track_ranges(const float* low, const float* high, const int64_t* nonfinite, int64_t channels, int64_t rows,
                         const Tracking& tracking, float* zero_point, cudaStream_t stream) {
  follow<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(low, high, nonfinite, channels, rows, tracking,
                                                                   zero_point);
  return cudaGetLastError();
}

template <class T>
cudaError_t include_nonfinite(const T* x, Layout layout, ExtremaOut extrema, cudaStream_t stream) {
  const int64_t n = layout.size();
  include<<<blocks_for(n), threads_per_block, 0, stream>>>(x, n, layout, extrema);
  return cudaGetLastError();
}

template <class T>
cudaError_t fold_weight(const T* w, int64_t n, const BatchNorm& f, float* out, cudaStream_t stream) {
  fold<<<blocks_for(n), threads_per_block, 0, stream>>>(w, n, f, out);
  return cudaGetLastError();
}

template <class T>
cudaError_t unfold_weight(const float* folded, int64_t n, const BatchNorm& f, T* y, cudaStream_t stream) {
  unfold<<<blocks_for(n), threads_per_block, 0, stream>>>(folded, n, f, y);
  return cudaGetLastError();
}

cudaError_t weight_factors(const BatchNorm& f, int64_t channels, float* out, cudaStream_t stream) {
  factors<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(f, channels, out);
  return cudaGetLastError();
}

#define QAT_INSTANTIATE(T)                                                                      \
  template cudaError_t include_nonfinite(const T*, Layout, ExtremaOut, cudaStream_t);           \
  template cudaError_t fold_weight(const T*, int64_t, const BatchNorm&, float*, cudaStream_t);  \
  template cudaError_t unfold_weight(const float*, int64_t, const BatchNorm&, T*, cudaStream_t);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)

}  // namespace qat::cuda
