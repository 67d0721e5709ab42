#include "histogram.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "blocks.h"

namespace qat {
namespace {

// More than a vector has lanes: what a kernel may write behind the bins that count.
constexpr int64_t spare = 16;
constexpr float inf = std::numeric_limits<float>::infinity();

uint32_t pattern_of(float x) {
  uint32_t pattern;
  std::memcpy(&pattern, &x, sizeof(pattern));
  return pattern;
}
uint32_t pattern_of(uint16_t x) { return static_cast<uint32_t>(x) << 16; }

int shift_of(const HistogramOut& out) { return 23 - out.mantissa_bits; }

// Adding zero makes -0.0 into 0.0: which of the two a minimum finds would depend on the order.
void merge(const Extrema& found, int64_t channel, const ExtremaOut& out) {
  out.low[channel] = std::min(out.low[channel], found.low) + 0.0f;
  out.high[channel] = std::max(out.high[channel], found.high) + 0.0f;
  *out.nonfinite += found.nonfinite;
}

// The kernels count what is not finite like anything else, which is the last bins of either sign.
void forget_nonfinite(const HistogramOut& out, int64_t channels) {
  const int64_t half = out.bins() / 2, finite = half - (int64_t{1} << out.mantissa_bits);
  for (int64_t at = 0; at < channels * out.bins(); at += half) {
    std::fill(out.counts + at + finite, out.counts + at + half, 0);
  }
}

// One thread's counters, all zero between two uses: the memory stays, for clearing it would take longer than counting a
// small tensor. Neighbouring elements are often equal, and a counter that is raised twice in a row waits for its own
// store: there are two tables, for even and odd places. Zeros, half of what leaves a ReLU, are not in the lists.
class Tables {
 public:
  explicit Tables(int64_t bins) : bins_(bins) {
    if (memory().size() < static_cast<size_t>(2 * bins)) memory().resize(static_cast<size_t>(2 * bins));
    even_ = memory().data();
    odd_ = even_ + bins;
  }

  void count(const uint32_t* bins, int64_t n) {
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      ++even_[bins[i]];
      ++odd_[bins[i + 1]];
    }
    if (i < n) ++even_[bins[i]];
  }

  // Empties the tables. Bins beyond those of the extrema were never raised, but for nan and infinities.
  void move_to(int64_t* counts, const Extrema& extrema, int shift) {
    const auto last = [&](float x) { return static_cast<int64_t>(pattern_of(x) >> shift) + 1; };
    const int64_t half = bins_ / 2;
    if (extrema.nonfinite > 0) {
      move(counts, 0, bins_);
      return;
    }
    if (extrema.high >= 0.0f) move(counts, 0, last(extrema.high + 0.0f));
    if (extrema.low <= 0.0f) move(counts, half, last(-std::abs(extrema.low)));
  }

 private:
  static std::vector<uint32_t>& memory() {
    thread_local std::vector<uint32_t> counters;
    return counters;
  }

  // Most bins are empty, in long stretches.
  void move(int64_t* counts, int64_t from, int64_t to) {
    constexpr int64_t stretch = 64;
    for (; from < to; from += stretch) {
      const int64_t n = std::min(stretch, to - from);
      uint32_t *const even = even_ + from, *const odd = odd_ + from;
      uint32_t any = 0;
      for (int64_t i = 0; i < n; ++i) any |= even[i] | odd[i];
      if (any == 0) continue;
      for (int64_t i = 0; i < n; ++i) counts[from + i] += int64_t{even[i]} + odd[i];
      std::fill_n(even, n, 0u);
      std::fill_n(odd, n, 0u);
    }
  }

  int64_t bins_;
  uint32_t *even_, *odd_;
};

// One channel.
template <class T>
void one_channel(const TypedKernels<T>& kernels, ParallelFor parallel, int64_t threads, const T* x, int64_t n,
                 const HistogramOut& out, BlockWriter writer) {
  // Tables take time to add up: only for many elements. 32-bit counters, so not for too many.
  const int64_t worth_a_table = 32, most = (int64_t{1} << 31) / block;
  const int64_t blocks = blocks_of(n);
  const bool own = blocks >= worth_a_table;
  const int shift = shift_of(out);
  std::mutex mutex;
  const auto part = [&](int64_t first, int64_t last) {
    uint32_t bins[block + spare];
    Tables tables(own ? out.bins() : 0);
    Extrema extrema{inf, -inf, 0};
    int64_t zeros = 0;
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      writer(begin, end);
      const int64_t found = kernels.bins_run(x + begin, end - begin, shift, bins, &extrema);
      zeros += end - begin - found;
      if (own) {
        tables.count(bins, found);
      } else {
        for (int64_t i = 0; i < found; ++i) ++out.counts[bins[i]];
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (own) tables.move_to(out.counts, extrema, shift);
    out.counts[0] += zeros;
    merge(extrema, 0, out.extrema);
  };
  // without tables of their own parts would race for the counters: one part then
  const int64_t parts = std::max<int64_t>(1, std::min(threads, blocks / worth_a_table));
  for (int64_t start = 0; start < blocks; start += most) {
    const int64_t stop = std::min(blocks, start + most), offset = start * block;
    const int64_t size = std::min(stop * block, n) - offset;
    if (parts == 1) {
      part(offset, offset + size);
    } else {
      over_blocks(parallel, size, (blocks_of(size) + parts - 1) / parts,
                  [&](int64_t first, int64_t last) { part(offset + first, offset + last); });
    }
  }
}

// The channels [first, last): no two threads share a counter.
template <class T>
void some_channels(const TypedKernels<T>& kernels, const T* x, Layout layout, int64_t first, int64_t last,
                   const HistogramOut& out, int64_t* nonfinite) {
  const int shift = shift_of(out);
  if (layout.inner == 1) {
    for (int64_t o = 0; o < layout.outer; ++o) {
      const T* row = x + o * layout.channels;
      kernels.extrema_each(row + first, last - first, out.extrema.low + first, out.extrema.high + first, nonfinite);
      for (int64_t c = first; c < last; ++c) ++out.counts[c * out.bins() + (pattern_of(row[c]) >> shift)];
    }
    for (int64_t c = first; c < last; ++c) out.extrema.low[c] += 0.0f, out.extrema.high[c] += 0.0f;
    return;
  }
  uint32_t bins[block + spare];
  for (int64_t c = first; c < last; ++c) {
    int64_t* counts = out.counts + c * out.bins();
    Extrema extrema{inf, -inf, 0};
    for (int64_t o = 0; o < layout.outer; ++o) {
      const T* run = x + (o * layout.channels + c) * layout.inner;
      for (int64_t begin = 0; begin < layout.inner; begin += block) {
        const int64_t size = std::min(block, layout.inner - begin);
        const int64_t found = kernels.bins_run(run + begin, size, shift, bins, &extrema);
        for (int64_t i = 0; i < found; ++i) ++counts[bins[i]];
        counts[0] += size - found;
      }
    }
    int64_t own = 0;
    merge(extrema, c, {out.extrema.low, out.extrema.high, &own});
    *nonfinite += own;
  }
}

}  // namespace

template <class T>
void observe_histogram(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, Layout layout,
                       const HistogramOut& out, BlockWriter writer) {
  const TypedKernels<T>& k = typed<T>(kernels);
  if (layout.channels == 1) {
    one_channel(k, parallel, threads, x, layout.size(), out, writer);
  } else {
    struct Context {
      const TypedKernels<T>& kernels;
      const T* x;
      Layout layout;
      const HistogramOut& out;
      std::mutex mutex;
    } context{k, x, layout, out, {}};
    const auto task = [](int64_t first, int64_t last, void* pointer) {
      auto* c = static_cast<Context*>(pointer);
      int64_t nonfinite = 0;
      some_channels(c->kernels, c->x, c->layout, first, last, c->out, &nonfinite);
      const std::lock_guard<std::mutex> lock(c->mutex);
      *c->out.extrema.nonfinite += nonfinite;
    };
    const int64_t at_least = std::max<int64_t>(1, grain * block / (layout.outer * layout.inner));
    parallel(0, layout.channels, at_least, task, &context);
  }
  forget_nonfinite(out, layout.channels);
}

#define QAT_INSTANTIATE(T)                                                                   \
  template void observe_histogram<T>(const Kernels&, ParallelFor, int64_t, const T*, Layout, \
                                     const HistogramOut&, BlockWriter);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
