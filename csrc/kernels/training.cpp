#include "training.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

namespace qat {
namespace {

// Elements that are worked on at a time: they and their scales stay in the first-level cache, and as a multiple of 8
// they end on a byte of the mask.
constexpr int64_t block = 1024;
// Below this many blocks a thread costs more than it brings.
constexpr int64_t grain = 16;

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels);
template <>
const TypedKernels<float>& typed<float>(const Kernels& kernels) {
  return kernels.f32;
}
template <>
const TypedKernels<uint16_t>& typed<uint16_t>(const Kernels& kernels) {
  return kernels.bf16;
}

int64_t blocks_of(int64_t n) { return (n + block - 1) / block; }

// function(first, last) over elements that begin and, but for the very end, end on a block.
template <class Function>
void over_blocks(ParallelFor parallel, int64_t n, int64_t blocks_at_least, const Function& function) {
  struct Context {
    const Function* function;
    int64_t n;
  } context{&function, n};
  const auto task = [](int64_t begin, int64_t end, void* pointer) {
    const auto* c = static_cast<Context*>(pointer);
    (*c->function)(begin * block, std::min(end * block, c->n));
  };
  parallel(0, blocks_of(n), blocks_at_least, task, &context);
}

// Calls function(channel, begin, end) for every stretch of one channel in [begin, end).
template <class Function>
void over_runs(const Layout& layout, int64_t begin, int64_t end, const Function& function) {
  int64_t channel = begin / layout.inner % layout.channels;
  int64_t run_end = (begin / layout.inner + 1) * layout.inner;
  while (begin < end) {
    const int64_t stop = std::min(run_end, end);
    function(channel, begin, stop);
    begin = stop;
    run_end += layout.inner;
    if (++channel == layout.channels) channel = 0;
  }
}

// The extrema that one thread gathers, merged into the common ones when it is done.
class LocalExtrema {
 public:
  explicit LocalExtrema(const Layout& layout)
      : layout_(layout),
        low_(static_cast<size_t>(layout.channels), std::numeric_limits<float>::infinity()),
        high_(static_cast<size_t>(layout.channels), -std::numeric_limits<float>::infinity()) {}

  template <class T>
  void widen(const TypedKernels<T>& kernels, const T* x, int64_t begin, int64_t end) {
    if (layout_.inner == 1 && layout_.channels > 1) {
      while (begin < end) {
        const int64_t channel = begin % layout_.channels;
        const int64_t count = std::min(layout_.channels - channel, end - begin);
        kernels.extrema_each(x + begin, count, &low_[static_cast<size_t>(channel)],
                             &high_[static_cast<size_t>(channel)], &nonfinite_);
        begin += count;
      }
      return;
    }
    over_runs(layout_, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      const auto c = static_cast<size_t>(channel);
      Extrema run{low_[c], high_[c], 0};
      kernels.extrema_run(x + from, to - from, &run);
      low_[c] = run.low;
      high_[c] = run.high;
      nonfinite_ += run.nonfinite;
    });
  }

  // Adding zero makes -0.0 into 0.0: which of the two a minimum finds would depend on the order.
  void merge_into(const ExtremaOut& out) const {
    for (size_t c = 0; c < low_.size(); ++c) {
      out.low[c] = std::min(out.low[c], low_[c]) + 0.0f;
      out.high[c] = std::max(out.high[c], high_[c]) + 0.0f;
    }
    *out.nonfinite += nonfinite_;
  }

 private:
  Layout layout_;
  std::vector<float> low_, high_;
  int64_t nonfinite_ = 0;
};

// The grids of a block, element by element, for blocks that more than one channel shares.
class BlockGrids {
 public:
  BlockGrids(const Layout& layout, const float* scale, const float* zero_point)
      : layout_(layout), scales_(scale), zero_points_(zero_point), period_(layout.channels * layout.inner) {
    if (layout.inner >= short_run || layout.channels == 1) return;
    // Filling short runs again for every block would take longer than the quantization: the sequence of all channels,
    // continued by a block, has every block's grids somewhere in it.
    const int64_t size = period_ + std::min(block, layout.size());
    scale_table_.resize(static_cast<size_t>(size));
    zero_point_table_.resize(static_cast<size_t>(size));
    spread(0, size, scale_table_.data(), zero_point_table_.data());
  }

  struct Grids {
    const float *scale, *zero_point;
  };

  // Those of [begin, end), in a table of all channels or in the caller's buffers of `block` elements.
  Grids of(int64_t begin, int64_t end, float* scale, float* zero_point) const {
    if (!scale_table_.empty()) {
      const int64_t at = begin % period_;
      return {scale_table_.data() + at, zero_point_table_.data() + at};
    }
    spread(begin, end, scale, zero_point);
    return {scale, zero_point};
  }

 private:
  static constexpr int64_t short_run = 32;

  void spread(int64_t begin, int64_t end, float* scale, float* zero_point) const {
    over_runs(layout_, begin, end, [&](int64_t c, int64_t from, int64_t to) {
      std::fill(scale + (from - begin), scale + (to - begin), scales_[c]);
      std::fill(zero_point + (from - begin), zero_point + (to - begin), zero_points_[c]);
    });
  }

  Layout layout_;
  const float *scales_, *zero_points_;
  int64_t period_;
  std::vector<float> scale_table_, zero_point_table_;
};

}  // namespace

template <class T>
void fake_quantize(const Kernels& kernels, ParallelFor parallel, const T* x, T* y, uint8_t* bits, Layout layout,
                   const float* scale, const float* zero_point, Range range, const ExtremaOut* extrema) {
  const TypedKernels<T>& k = typed<T>(kernels);
  std::mutex mutex;
  const BlockGrids grids(layout, scale, zero_point);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    float scale_buffer[block], zero_point_buffer[block];
    LocalExtrema local(extrema != nullptr ? layout : Layout{0, 0, 1});
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      uint8_t* const to = bits == nullptr ? nullptr : bits + begin / 8;
      if (extrema != nullptr) local.widen(k, x, begin, end);
      const int64_t run = begin / layout.inner;
      if ((end - 1) / layout.inner == run) {
        const int64_t c = run % layout.channels;
        k.quantize_run(x + begin, y + begin, to, end - begin, scale[c], zero_point[c], range);
      } else {
        const auto each = grids.of(begin, end, scale_buffer, zero_point_buffer);
        k.quantize_each(x + begin, y + begin, to, end - begin, each.scale, each.zero_point, range);
      }
    }
    if (extrema != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex);
      local.merge_into(*extrema);
    }
  });
}

template <class T>
void mask_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const uint8_t* bits, T* out,
                   int64_t n) {
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    typed<T>(kernels).mask_run(grad + first, bits + first / 8, out + first, last - first);
  });
}

template <class T>
void observe_extrema(const Kernels& kernels, ParallelFor parallel, const T* x, Layout layout, ExtremaOut extrema) {
  std::mutex mutex;
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    local.widen(typed<T>(kernels), x, first, last);
    const std::lock_guard<std::mutex> lock(mutex);
    local.merge_into(extrema);
  });
}

namespace {

inline uint32_t bin_of(const float* x) {
  uint32_t pattern;
  std::memcpy(&pattern, x, sizeof(pattern));
  return pattern >> 16;
}
inline uint32_t bin_of(const uint16_t* x) { return *x; }

// Neighbouring elements are often equal (zeros behind a ReLU), and a counter that is raised twice in a row waits for
// its own store: even and odd elements have a table each.
template <class T, class Count>
void count_block(const T* x, int64_t n, Count* even, Count* odd) {
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++even[bin_of(x + i)];
    ++odd[bin_of(x + i + 1)];
  }
  if (i < n) ++even[bin_of(x + i)];
}

}  // namespace

template <class T>
void observe_histogram(const Kernels& kernels, ParallelFor parallel, int64_t threads, const T* x, int64_t n,
                       int64_t* counts, ExtremaOut extrema) {
  // A table is 512 KiB to clear and to add up: only for many elements. 32-bit counters, so not for too many.
  constexpr int64_t worth_a_table = 8 * histogram_bins / block, most = (int64_t{1} << 31) / block;
  const Layout layout{1, 1, n};
  const int64_t blocks = blocks_of(n);
  std::mutex mutex;
  const auto part = [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    const bool own = blocks >= worth_a_table;
    std::vector<uint32_t> tables(own ? static_cast<size_t>(2 * histogram_bins) : 0);
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      local.widen(typed<T>(kernels), x, begin, end);
      if (own) {
        count_block(x + begin, end - begin, tables.data(), tables.data() + histogram_bins);
      } else {
        count_block(x + begin, end - begin, counts, counts);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t bin = 0; own && bin < histogram_bins; ++bin) {
      counts[bin] += int64_t{tables[static_cast<size_t>(bin)]} + tables[static_cast<size_t>(bin + histogram_bins)];
    }
    local.merge_into(extrema);
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
  for (const int64_t sign : {0, 0x8000}) std::fill(counts + sign + 0x7f80, counts + sign + 0x8000, 0);
}

#define QAT_INSTANTIATE(T)                                                                                          \
  template void fake_quantize<T>(const Kernels&, ParallelFor, const T*, T*, uint8_t*, Layout, const float*,         \
                                 const float*, Range, const ExtremaOut*);                                           \
  template void mask_gradient<T>(const Kernels&, ParallelFor, const T*, const uint8_t*, T*, int64_t);               \
  template void observe_extrema<T>(const Kernels&, ParallelFor, const T*, Layout, ExtremaOut);                      \
  template void observe_histogram<T>(const Kernels&, ParallelFor, int64_t, const T*, int64_t, int64_t*, ExtremaOut);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
