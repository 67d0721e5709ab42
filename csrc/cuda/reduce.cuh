// Sums over all but the channels in two stages of fixed order: the same bits in every run, no atomics on floats.
#pragma once

#include "device.cuh"
#include "terms.h"
#include "walk.h"

namespace qat::cuda {

constexpr int lanes = 32, rows_per_block = threads_per_block / lanes;
constexpr int64_t most_splits = 256;

// Runs of a channel shorter than a warp: neighbouring threads take neighbouring channels (channels_last).
inline bool by_columns(Layout layout) { return layout.inner < lanes && layout.channels > 1; }

// Depends on the shape alone, not on the device.
inline int64_t splits_of(Layout layout) {
  const int64_t positions = layout.outer * layout.inner;
  const int64_t blocks = by_columns(layout) ? (layout.channels + lanes - 1) / lanes : layout.channels;
  const int64_t useful = (positions + 2047) / 2048, wanted = 2048 / blocks + 1;
  const int64_t splits = useful < wanted ? useful : wanted;
  return splits < 1 ? 1 : splits < most_splits ? splits : most_splits;
}

// sums[i] = those of the threads i, i + last, i + 2 last, ... of a block, for i < last; the other threads must not read.
template <int last, class Sum>
__device__ void fold_block(Sum* sums, const Sum& own) {
  sums[threadIdx.x] = own;
#pragma unroll
  for (int d = threads_per_block / 2; d >= last; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) sums[threadIdx.x].merge(sums[threadIdx.x + d]);
  }
}

// partial[split * channels + channel] = sum of terms.add(sum, channel, element).
template <bool columns, class Terms, class Sum = typename Terms::Sum>
__global__ void __launch_bounds__(threads_per_block, 4) reduce(Terms terms, Layout layout, int64_t part, Sum* partial) {
  __shared__ Sum sums[threads_per_block];
  const int64_t channel =
      columns ? int64_t{blockIdx.x} * lanes + threadIdx.x % lanes : static_cast<int64_t>(blockIdx.x);
  const int64_t first = blockIdx.y * part, positions = layout.outer * layout.inner;
  const int64_t end = first + part < positions ? first + part : positions;
  const int64_t begin = first + (columns ? threadIdx.x / lanes : threadIdx.x);
  constexpr int step = columns ? rows_per_block : threads_per_block;
  Sum own;
  own.clear();
  if (channel < layout.channels) {
    Walk walk(layout, channel, begin, step);
#pragma unroll 4
    for (int64_t p = begin; p < end; p += step) {
      terms.add(own, channel, walk.at);
      walk.next();
    }
  }
  constexpr int last = columns ? lanes : 1;
  fold_block<last>(sums, own);
  if (threadIdx.x < last && channel < layout.channels) {
    partial[blockIdx.y * layout.channels + channel] = sums[threadIdx.x];
  }
}

constexpr int channels_per_block = 8;

// finish(channel, sum); the splits of a channel are added by 32 threads, in an order that their number decides.
template <class Finish, class Sum>
__global__ void __launch_bounds__(threads_per_block)
    combine(Finish finish, const Sum* partial, int64_t channels, int64_t splits) {
  __shared__ Sum sums[threads_per_block];
  const int64_t channel = int64_t{blockIdx.x} * channels_per_block + threadIdx.x % channels_per_block;
  Sum own;
  own.clear();
  if (channel < channels) {
    for (int64_t s = threadIdx.x / channels_per_block; s < splits; s += threads_per_block / channels_per_block) {
      own.merge(partial[s * channels + channel]);
    }
  }
  fold_block<channels_per_block>(sums, own);
  if (threadIdx.x < channels_per_block && channel < channels) finish(channel, sums[threadIdx.x]);
}

template <class Terms, class Finish>
cudaError_t reduce_channels(Terms terms, Finish finish, Layout layout, void* scratch, cudaStream_t stream) {
  const int64_t splits = splits_of(layout), positions = layout.outer * layout.inner;
  const int64_t part = (positions + splits - 1) / splits;
  auto* partial = static_cast<typename Terms::Sum*>(scratch);
  const auto rows = static_cast<unsigned>(splits);
  if (by_columns(layout)) {
    const auto blocks = static_cast<unsigned>((layout.channels + lanes - 1) / lanes);
    reduce<true><<<dim3(blocks, rows), threads_per_block, 0, stream>>>(terms, layout, part, partial);
  } else {
    const auto blocks = static_cast<unsigned>(layout.channels);
    reduce<false><<<dim3(blocks, rows), threads_per_block, 0, stream>>>(terms, layout, part, partial);
  }
  const auto blocks = static_cast<unsigned>((layout.channels + channels_per_block - 1) / channels_per_block);
  combine<<<blocks, threads_per_block, 0, stream>>>(finish, partial, layout.channels, splits);
  return cudaGetLastError();
}

}  // namespace qat::cuda
