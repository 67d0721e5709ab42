// Batch norm or an addition, clamp, observation and fake quantization: two passes forward, two backward.
#include "../kernels/grid.h"
#include "affine.h"
#include "launch.h"
#include "norm.cuh"
#include "reduce.cuh"

namespace qat::cuda {
namespace {

// ---- by channel

struct MomentTerms {
  using Sum = Moments;
  const float* x;
  __device__ void add(Moments& own, int64_t, int64_t at) const { own.add(x[at]); }
};

struct MomentFinish {
  double count;
  NormParameters p;
  NormLines lines;
  __device__ void operator()(int64_t c, const Moments& m) const {
    const Statistics s = statistics_of(m, count, p.eps);
    lines.mean[c] = s.mean;
    lines.inverse[c] = s.inverse;
    lines.low[c] = m.low;
    lines.high[c] = m.high;
    float *mean = p.running_mean, *var = p.running_var;
    if (mean != nullptr) mean[c] = moved_statistic(mean[c], s.center, p.momentum);
    if (var != nullptr) var[c] = moved_statistic(var[c], s.spread * count / (count - 1.0), p.momentum);
    set_line(p.gamma, p.beta, lines.mean, lines.inverse, lines.factor, lines.shift, c);
  }
};

__global__ void freeze(int64_t channels, NormParameters p, NormLines lines) {
  const int64_t c = thread_of_grid();
  if (c >= channels) return;
  lines.mean[c] = p.running_mean[c];
  lines.inverse[c] = frozen_inverse(p.running_var[c], static_cast<float>(p.eps));
  set_line(p.gamma, p.beta, lines.mean, lines.inverse, lines.factor, lines.shift, c);
}

// One block.
__global__ void __launch_bounds__(threads_per_block)
    follow(const float* low, const float* high, const float* factor, const float* shift, const int64_t* nonfinite,
           int64_t channels, Range bounds, int64_t rows, Tracking t) {
  __shared__ Reached sums[threads_per_block];
  Reached own;
  own.clear();
  for (int64_t c = threadIdx.x; c < channels; c += threads_per_block) {
    const Line line = factor == nullptr ? Line{1.0f, 0.0f} : Line{factor[c], shift[c]};
    own.add(low[c], line);
    own.add(high[c], line);
  }
  fold_block<1>(sums, own);
  if (threadIdx.x != 0) return;
  Reached all = sums[0];
  all.numbers = all.numbers && (nonfinite == nullptr || *nonfinite == 0);
  const Range range = all.clamped(bounds);
  grid::track(range.low, range.high, t.momentum, t.rule, t.state, 0);
  *t.samples += rows;
}

// ---- by element

// One value a channel for eight elements: `rows` where whole octets lie side by side in a row of channels.
template <bool rows, class Index>
__device__ void values_of(Octet<float>& to, const float* values, Index start, int count, const Channel<Index>& at) {
  if (rows) load(to, values + start, octet, true);
  else spread(to, values, count, at);
}

template <bool rows, class Index>
__global__ void __launch_bounds__(threads_per_block)
    apply(const float* x, float* y, uint8_t* bits, Index n, Index channels, Index inner, const float* factor,
          const float* shift, StepsOnDevice on_device, bool aligned) {
  const DroppingSteps steps = steps_of(on_device);
  const Index octets = (n + octet - 1) / octet, step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index o = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; o < octets; o += step) {
    const Index start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<float> v, factors, shifts;
    load(v, x + start, count, aligned);
    const Channel<Index> at(rows ? 0 : start, channels, inner);
    const Index column = rows ? start % channels : 0;
    values_of<rows>(factors, factor, column, count, at);
    values_of<rows>(shifts, shift, column, count, at);
    const uint8_t own = norm_octet(v, count, factors, shifts, steps, static_cast<int64_t>(start));
    store(y + start, v, count, aligned);
    if (bits != nullptr) bits[o] = own;
  }
}

__global__ void __launch_bounds__(threads_per_block) add(const float* x, const float* other, float* y, uint8_t* bits,
                                                         int64_t n, StepsOnDevice on_device, bool aligned) {
  const DroppingSteps steps = steps_of(on_device);
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = thread_of_grid(); o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<float> a, b;
    load(a, x + start, count, aligned);
    load(b, other + start, count, aligned);
    const uint8_t own = add_octet(a, b, count, steps, start);
    store(y + start, a, count, aligned);
    if (bits != nullptr) bits[o] = own;
  }
}

__global__ void __launch_bounds__(threads_per_block)
    observe_sum(const float* x, const float* other, int64_t n, ExtremaOut extrema, bool aligned) {
  Extrema own;
  own.clear();
  const int64_t octets = (n + octet - 1) / octet, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t o = thread_of_grid(); o < octets; o += step) {
    const int64_t start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<float> a, b;
    load(a, x + start, count, aligned);
    load(b, other + start, count, aligned);
#pragma unroll
    for (int i = 0; i < octet; ++i) {
      if (i < count) own.add(a.value[i] + b.value[i]);
    }
  }
  count_into(extrema.nonfinite, own.nonfinite);
  widen_one(extrema, own);
}

// ---- the gradient

struct ProductTerms {
  using Sum = Pair;
  const float *x, *grad;
  const uint8_t* bits;
  __device__ void add(Pair& own, int64_t, int64_t at) const {
    add_product(own, (bits[at / 8] >> (at % 8)) & 1 ? grad[at] : 0.0f, x[at]);
  }
};

__global__ void factors_of(int64_t channels, NormSlopes s) {
  const int64_t c = thread_of_grid();
  if (c < channels) s.factor[c] = (s.gamma == nullptr ? 1.0f : s.gamma[c]) * s.inverse[c];
}

template <bool rows, bool frozen, class Index>
__global__ void __launch_bounds__(threads_per_block)
    gradient(const float* x, const float* grad, const uint8_t* bits, float* dx, Index n, Index channels, Index inner,
             NormSlopes s, bool aligned) {
  const Index octets = (n + octet - 1) / octet, step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index o = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; o < octets; o += step) {
    const Index start = o * octet;
    const int count = static_cast<int>(n - start < octet ? n - start : octet);
    Octet<float> g, factors;
    load(g, grad + start, count, aligned);
    mask_octet(g, bits[o]);
    const Channel<Index> at(rows ? 0 : start, channels, inner);
    const Index column = rows ? start % channels : 0;
    values_of<rows>(factors, s.factor, column, count, at);
    if (frozen) {
      // x is not read: an infinity in it must not become nan
#pragma unroll
      for (int i = 0; i < octet; ++i) g.value[i] *= factors.value[i];
    } else {
      Octet<float> v, slopes, centers, offsets;
      load(v, x + start, count, aligned);
      values_of<rows>(slopes, s.slope, column, count, at);
      values_of<rows>(centers, s.mean, column, count, at);
      values_of<rows>(offsets, s.offset, column, count, at);
#pragma unroll
      for (int i = 0; i < octet; ++i) {
        g.value[i] = norm_gradient(g.value[i], v.value[i], factors.value[i], slopes.value[i], centers.value[i],
                                   offsets.value[i]);
      }
    }
    store(dx + start, g, count, aligned);
  }
}

// f(whether channels are rows of whole octets, sizes in the smallest type that holds them); `aligned`: so are the values of
// the channels.
template <class F>
void with_index(Layout layout, bool aligned, F f) {
  const int64_t n = layout.size(), channels = layout.channels, inner = layout.inner;
  const bool rows = aligned && inner == 1 && channels % octet == 0;
  const auto sized = [&](auto is_rows) {
    if (n < int64_t{1} << 31) {
      f(is_rows, static_cast<uint32_t>(n), static_cast<uint32_t>(channels), static_cast<uint32_t>(inner));
    } else {
      f(is_rows, static_cast<uint64_t>(n), static_cast<uint64_t>(channels), static_cast<uint64_t>(inner));
    }
  };
  if (rows) sized(std::true_type{});
  else sized(std::false_type{});
}

int blocks_of_octets(int64_t n) { return blocks_for((n + octet - 1) / octet); }

}  // namespace

cudaError_t batch_lines(const float* x, Layout layout, const NormParameters& parameters, const NormLines& lines,
                        void* scratch, cudaStream_t stream) {
  const auto count = static_cast<double>(layout.outer * layout.inner);
  return reduce_channels(MomentTerms{x}, MomentFinish{count, parameters, lines}, layout, scratch, stream);
}

cudaError_t frozen_lines(int64_t channels, const NormParameters& parameters, const NormLines& lines,
                         cudaStream_t stream) {
  freeze<<<blocks_of_each(channels), threads_per_block, 0, stream>>>(channels, parameters, lines);
  return cudaGetLastError();
}

cudaError_t track_lines(const float* low, const float* high, const float* factor, const float* shift,
                        const int64_t* nonfinite, int64_t channels, Range bounds, int64_t rows,
                        const Tracking& tracking, cudaStream_t stream) {
  follow<<<1, threads_per_block, 0, stream>>>(low, high, factor, shift, nonfinite, channels, bounds, rows, tracking);
  return cudaGetLastError();
}

cudaError_t norm_apply(const float* x, float* y, uint8_t* bits, Layout layout, const float* factor, const float* shift,
                       const StepsOnDevice& steps, cudaStream_t stream) {
  const bool aligned = is_aligned(x) && is_aligned(y);
  with_index(layout, is_aligned(factor) && is_aligned(shift), [&](auto rows, auto n, auto channels, auto inner) {
    apply<decltype(rows)::value><<<blocks_of_octets(layout.size()), threads_per_block, 0, stream>>>(
        x, y, bits, n, channels, inner, factor, shift, steps, aligned);
  });
  return cudaGetLastError();
}

cudaError_t add_apply(const float* x, const float* other, float* y, uint8_t* bits, int64_t n,
                      const StepsOnDevice& steps, cudaStream_t stream) {
  const bool aligned = is_aligned(x) && is_aligned(other) && is_aligned(y);
  add<<<blocks_of_octets(n), threads_per_block, 0, stream>>>(x, other, y, bits, n, steps, aligned);
  return cudaGetLastError();
}

cudaError_t add_extrema(const float* x, const float* other, int64_t n, ExtremaOut extrema, cudaStream_t stream) {
  observe_sum<<<blocks_of_octets(n), threads_per_block, 0, stream>>>(x, other, n, extrema,
                                                                   is_aligned(x) && is_aligned(other));
  return cudaGetLastError();
}

cudaError_t norm_gradient(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                          const NormSlopes& slopes, float* dx, cudaStream_t stream) {
  const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(dx);
  const int blocks = blocks_of_octets(layout.size());
  const bool values_aligned = is_aligned(slopes.factor) && is_aligned(slopes.mean) && is_aligned(slopes.slope) &&
                              is_aligned(slopes.offset);
  with_index(layout, values_aligned, [&](auto rows, auto n, auto channels, auto inner) {
    constexpr bool r = decltype(rows)::value;
    if (slopes.slope == nullptr) {
      gradient<r, true>
          <<<blocks, threads_per_block, 0, stream>>>(x, grad, bits, dx, n, channels, inner, slopes, aligned);
    } else {
      gradient<r, false>
          <<<blocks, threads_per_block, 0, stream>>>(x, grad, bits, dx, n, channels, inner, slopes, aligned);
    }
  });
  return cudaGetLastError();
}

cudaError_t norm_backward(const float* x, const float* grad, const uint8_t* bits, Layout layout,
                          const NormSlopes& slopes, float* dx, void* scratch, cudaStream_t stream) {
  cudaError_t error;
  if (slopes.dgamma != nullptr) {
    const auto count = static_cast<double>(layout.outer * layout.inner);
    error = reduce_channels(ProductTerms{x, grad, bits}, ProductFinish{count, slopes}, layout, scratch, stream);
  } else {
    factors_of<<<blocks_of_each(layout.channels), threads_per_block, 0, stream>>>(layout.channels, slopes);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) return error;
  return norm_gradient(x, grad, bits, layout, slopes, dx, stream);
}

}  // namespace qat::cuda
