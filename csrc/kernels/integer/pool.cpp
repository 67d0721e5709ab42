#include "pool.h"

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "nest.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;

// The part of a window along one dimension that lies on x: taps first, first + 1, ... last - 1.
struct Window {
  int64_t start;  // position of tap 0
  int64_t first, last;

  Window(int64_t index, int64_t stride, int64_t pad, int64_t kernel, int64_t dilation, int64_t size)
      : start(index * stride - pad),
        first(start < 0 ? (-start + dilation - 1) / dilation : 0),
        last(start >= size ? 0 : std::min(kernel, (size - 1 - start) / dilation + 1)) {}
};

// Calls function(y offset, window, window, x offset of the image) for parts of the windows.
template <class Function>
void for_windows(const Threads& threads, const View& x, const PoolShape& s, const View& y, const Function& function) {
  const int64_t channels = x.sizes[3], width = y.sizes[2];
  const int64_t work = width * channels * s.kernel_h * s.kernel_w / 4;
  parallel(threads, y.sizes[0] * y.sizes[1], work, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / y.sizes[1] * x.sizes[1] * x.sizes[2] * channels;
      const Window h(row % y.sizes[1], s.stride_h, s.pad_top, s.kernel_h, s.dilation_h, x.sizes[1]);
      for (int64_t column = 0; column < width; ++column) {
        const Window w(column, s.stride_w, s.pad_left, s.kernel_w, s.dilation_w, x.sizes[2]);
        function((row * width + column) * channels, h, w, image);
      }
    }
  });
}

// Positions of x and its padding that a window covers along one dimension.
int64_t covered(const Window& window, int64_t kernel, int64_t size, int64_t begin, int64_t end, bool count_padding) {
  const int64_t first = count_padding ? -begin : 0, limit = count_padding ? size + end : size;
  return std::min(window.start + kernel, limit) - std::max(window.start, first);
}

// Codes less the zero point, summed over the reduced dimensions of `inner` outputs; exact for any number of codes.
void sum_codes(const Loops& loops, const View& x, const Nest& reduced, const void* from, int64_t inner, int64_t* sums) {
  // so many 16-bit codes cannot leave 32 bits
  constexpr int64_t most = 32768;
  std::fill(sums, sums + inner, int64_t{0});
  const int32_t last = reduced.rank - 1;
  const int64_t rows = reduced.rank > 0 ? reduced.sizes[last] : 1;
  const int64_t stride = reduced.rank > 0 ? reduced.strides[0][last] : 0;
  const int64_t groups = reduced.count(std::max(last, 0));
  Position at_group(reduced, std::max(last, 0), 0);
  for (int64_t group = 0; group < groups; ++group, at_group.next()) {
    for (int64_t row = 0; row < rows; row += most) {
      int32_t part[tile] = {};
      const int64_t some = std::min(most, rows - row);
      loops.sum(x.type, at(from, x.type, at_group.offsets[0] + row * stride), some, stride, inner, part);
      for (int64_t i = 0; i < inner; ++i) sums[i] += part[i];
    }
  }
  const int64_t zero = groups * rows * x.grid.zero_point;
  for (int64_t i = 0; i < inner; ++i) sums[i] -= zero;
}

}  // namespace

void max_pool(const char* isa, const Threads& threads, const View& x, const PoolShape& s, const View& y) {
  const Loops& loops = find_loops(isa);
  const int64_t channels = x.sizes[3], width = x.sizes[2];
  for_windows(threads, x, s, y, [&](int64_t to, const Window& h, const Window& w, int64_t image) {
    // larger windows are done in several steps, of which each takes up the result so far
    constexpr int64_t most = 64;
    const void* taps[most];
    void* const result = at(y.data, y.type, to);
    int64_t count = 0;
    for (int64_t i = h.first; i < h.last; ++i) {
      const int64_t line = image + (h.start + i * s.dilation_h) * width * channels;
      for (int64_t j = w.first; j < w.last; ++j) {
        if (count == most) {
          loops.maximum(x.type, taps, count, channels, result);
          taps[0] = result;
          count = 1;
        }
        taps[count++] = at(x.data, x.type, line + (w.start + j * s.dilation_w) * channels);
      }
    }
    if (count > 0) loops.maximum(x.type, taps, count, channels, result);
  });
}

void avg_pool(const char* isa, const Threads& threads, const View& x, const PoolShape& s, const View& y) {
  const Loops& loops = find_loops(isa);
  const int64_t channels = x.sizes[3], width = x.sizes[2];
  const bool wide = x.grid.wide || y.grid.wide;
  for_windows(threads, x, s, y, [&](int64_t to, const Window& h, const Window& w, int64_t image) {
    const int64_t down = covered(h, s.kernel_h, x.sizes[1], s.pad_top, s.pad_bottom, s.count_include_pad);
    const int64_t across = covered(w, s.kernel_w, x.sizes[2], s.pad_left, s.pad_right, s.count_include_pad);
    const float count = static_cast<float>(down * across);
    for (int64_t c = 0; c < channels; c += tile) {
      const int64_t n = std::min(tile, channels - c);
      float sum[tile] = {};
      for (int64_t i = h.first; i < h.last; ++i) {
        const int64_t line = image + (h.start + i) * width * channels;
        for (int64_t j = w.first; j < w.last; ++j) {
          loops.sum_real(x.type, x.grid, at(x.data, x.type, line + (w.start + j) * channels + c), n, sum);
        }
      }
      void* const result = at(y.data, y.type, to + c);
      if (wide) {
        for (int64_t i = 0; i < n; ++i) sum[i] /= count;
        loops.quantize(y.type, y.grid, sum, n, result);
      } else {
        loops.average(y.type, y.grid, sum, count, n, result);
      }
    }
  });
}

void mean(const char* isa, const Threads& threads, const View& x, const int64_t* axes, int32_t count, const View& y) {
  const Loops& loops = find_loops(isa);
  int64_t strides[max_rank];
  dense_strides(x, strides);
  Nest kept, reduced;
  kept.operands = reduced.operands = 1;
  for (int32_t d = 0; d < x.rank; ++d) {
    (std::find(axes, axes + count, d) != axes + count ? reduced : kept).push(x.sizes[d], &strides[d]);
  }
  // outputs whose codes lie side by side are summed together
  const bool dense = kept.rank > 0 && kept.strides[0][kept.rank - 1] == 1;
  const int32_t outer = dense ? kept.rank - 1 : kept.rank;
  const int64_t inner = dense ? kept.sizes[outer] : 1, terms = reduced.count(reduced.rank);
  const float factor = x.grid.scale / (y.grid.scale * static_cast<float>(terms));
  const bool wide = x.grid.wide || y.grid.wide;
  const int64_t tiles = (inner + tile - 1) / tile;
  parallel(threads, kept.count(outer) * tiles, terms * std::min(inner, tile), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Position position(kept, outer, i / tiles);
      const int64_t start = i % tiles * tile, n = std::min(tile, inner - start);
      int64_t sums[tile];
      sum_codes(loops, x, reduced, at(x.data, x.type, position.offsets[0] + start), n, sums);
      float real[tile];
      for (int64_t k = 0; k < n; ++k) {
        real[k] = wide ? static_cast<float>(static_cast<double>(sums[k]) * static_cast<double>(x.grid.scale) /
                                            static_cast<double>(terms))
                       : static_cast<float>(sums[k]) * factor;
      }
      // what is in units of y's steps already is divided by 1
      Grid grid = y.grid;
      if (!wide) grid.scale = 1.0f;
      loops.quantize(y.type, grid, real, n, at(y.data, y.type, i / tiles * inner + start));
    }
  });
}

}  // namespace qat
