// Sums over all but the channels in two stages of fixed order: the same bits in every run, no atomics on floats.
#pragma once

#include "device.cuh"
#include "terms.h"

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

// partial[split * channels + channel] = sum of terms(channel, element).
template <bool columns, class Terms>
__global__ void __launch_bounds__(threads_per_block) reduce(Terms terms, Layout layout, int64_t part, Pair* partial) {
  __shared__ Pair sums[threads_per_block];
  const int64_t channel =
      columns ? int64_t{blockIdx.x} * lanes + threadIdx.x % lanes : static_cast<int64_t>(blockIdx.x);
  const int64_t first = blockIdx.y * part, positions = layout.outer * layout.inner;
  const int64_t end = first + part < positions ? first + part : positions;
  const int begin = columns ? threadIdx.x / lanes : threadIdx.x;
  constexpr int step = columns ? rows_per_block : threads_per_block;
  Pair own{0.0f, 0.0f};
  if (channel < layout.channels) {
#pragma unroll 4
    for (int64_t p = first + begin; p < end; p += step) {
      const Pair term = terms(channel, element_of(layout, channel, p));
      own.first += term.first;
      own.second += term.second;
    }
  }
  sums[threadIdx.x] = own;
  constexpr int last = columns ? lanes : 1;
#pragma unroll
  for (int d = threads_per_block / 2; d >= last; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) {
      sums[threadIdx.x].first += sums[threadIdx.x + d].first;
      sums[threadIdx.x].second += sums[threadIdx.x + d].second;
    }
  }
  if (threadIdx.x < last && channel < layout.channels) {
    partial[blockIdx.y * layout.channels + channel] = sums[threadIdx.x];
  }
}

// finish(channel, first, second), the sums in float64.
template <class Finish>
__global__ void combine(Finish finish, const Pair* partial, int64_t channels, int64_t splits) {
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  double first = 0, second = 0;
  for (int64_t s = 0; s < splits; ++s) {
    first += partial[s * channels + channel].first;
    second += partial[s * channels + channel].second;
  }
  finish(channel, first, second);
}

template <class Terms, class Finish>
cudaError_t reduce_channels(Terms terms, Finish finish, Layout layout, float* scratch, cudaStream_t stream) {
  const int64_t splits = splits_of(layout), positions = layout.outer * layout.inner;
  const int64_t part = (positions + splits - 1) / splits;
  auto* partial = reinterpret_cast<Pair*>(scratch);
  const auto rows = static_cast<unsigned>(splits);
  if (by_columns(layout)) {
    const auto blocks = static_cast<unsigned>((layout.channels + lanes - 1) / lanes);
    reduce<true><<<dim3(blocks, rows), threads_per_block, 0, stream>>>(terms, layout, part, partial);
  } else {
    const auto blocks = static_cast<unsigned>(layout.channels);
    reduce<false><<<dim3(blocks, rows), threads_per_block, 0, stream>>>(terms, layout, part, partial);
  }
  const auto blocks = static_cast<unsigned>((layout.channels + 63) / 64);
  combine<<<blocks, 64, 0, stream>>>(finish, partial, layout.channels, splits);
  return cudaGetLastError();
}

}  // namespace qat::cuda
