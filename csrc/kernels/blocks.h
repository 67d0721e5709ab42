// What the drivers share: blocks of elements, stretches of one channel, and what a thread gathers or spreads there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "training.h"

namespace qat {

// Elements that are worked on at a time: they and their scales stay in the first-level cache, and as a multiple of 8
// they end on a byte of the mask.
constexpr int64_t block = 1024;
// Below this many blocks a thread costs more than it brings.
constexpr int64_t grain = 16;

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels);
template <>
inline const TypedKernels<float>& typed<float>(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const TypedKernels<uint16_t>& typed<uint16_t>(const Kernels& kernels) {
  return kernels.bf16;
}

inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) {
  const uint32_t pattern = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &pattern, sizeof(value));
  return value;
}

inline int64_t blocks_of(int64_t n) { return (n + block - 1) / block; }

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

  // x: the elements from `begin` on.
  template <class T>
  void widen(const TypedKernels<T>& kernels, const T* x, int64_t begin, int64_t end) {
    if (layout_.inner == 1 && layout_.channels > 1) {
      while (begin < end) {
        const int64_t channel = begin % layout_.channels;
        const int64_t count = std::min(layout_.channels - channel, end - begin);
        kernels.extrema_each(x, count, &low_[static_cast<size_t>(channel)], &high_[static_cast<size_t>(channel)],
                             &nonfinite_);
        x += count;
        begin += count;
      }
      return;
    }
    over_runs(layout_, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      const auto c = static_cast<size_t>(channel);
      Extrema run{low_[c], high_[c], 0};
      kernels.extrema_run(x + (from - begin), to - from, &run);
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

// One value a channel, element by element, for blocks that more than one channel shares.
class Spread {
 public:
  Spread(const Layout& layout, const float* values)
      : layout_(layout), values_(values), period_(layout.channels * layout.inner) {
    if (layout.inner >= short_run || layout.channels == 1 || layout.outer == 1) return;
    // Filling short runs again for every block would take longer than the quantization: the sequence of all channels,
    // continued by a block, has every block's values somewhere in it.
    table_.resize(static_cast<size_t>(period_ + std::min(block, layout.size())));
    fill(0, static_cast<int64_t>(table_.size()), table_.data());
  }

  // The values of [begin, end), in a table of all channels or in the caller's buffer of `block` elements.
  const float* of(int64_t begin, int64_t end, float* buffer) const {
    if (!table_.empty()) return table_.data() + begin % period_;
    fill(begin, end, buffer);
    return buffer;
  }

 private:
  static constexpr int64_t short_run = 32;

  void fill(int64_t begin, int64_t end, float* to) const {
    over_runs(layout_, begin, end, [&](int64_t c, int64_t from, int64_t until) {
      std::fill(to + (from - begin), to + (until - begin), values_[c]);
    });
  }

  Layout layout_;
  const float* values_;
  int64_t period_;
  std::vector<float> table_;
};

// The grids of a tensor. A block of one channel gets `run(scale, zero_point)`, any other `each(scales, zero_points)`.
class BlockGrids {
 public:
  BlockGrids(const Layout& layout, const float* scale, const float* zero_point)
      : layout_(layout), scale_(scale), zero_point_(zero_point), scales_(layout, scale),
        zero_points_(layout, zero_point) {}

  template <class Run, class Each>
  void with(int64_t begin, int64_t end, const Run& run, const Each& each) const {
    const int64_t index = begin / layout_.inner;
    if ((end - 1) / layout_.inner == index) {
      const int64_t c = index % layout_.channels;
      run(scale_[c], zero_point_[c]);
    } else {
      float scale_buffer[block], zero_point_buffer[block];
      each(scales_.of(begin, end, scale_buffer), zero_points_.of(begin, end, zero_point_buffer));
    }
  }

  // Fake-quantizes a block; x, y and bits point to its own elements.
  template <class T>
  void quantize(const TypedKernels<T>& kernels, const T* x, T* y, uint8_t* bits, int64_t begin, int64_t end,
                Range range) const {
    with(
        begin, end, [&](float s, float z) { kernels.quantize_run(x, y, bits, end - begin, s, z, range); },
        [&](const float* s, const float* z) { kernels.quantize_each(x, y, bits, end - begin, s, z, range); });
  }

 private:
  Layout layout_;
  const float *scale_, *zero_point_;
  Spread scales_, zero_points_;
};

}  // namespace qat
