#include "resize.h"

#include <algorithm>
#include <cstring>

#include "byte_table.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;

}  // namespace

void resize_nearest(const char* isa, const Threads& threads, const View& x, const int32_t* index_h,
                    const int32_t* index_w, const View& y) {
  const Loops& loops = find_loops(isa);
  const int64_t channels = x.sizes[3], width = y.sizes[2], in_width = x.sizes[2];
  const bool same = same_codes(x, y);
  ByteTable table;
  const ByteTable* const codes = !same && requantize_table(loops, x, y, y.count(), &table) ? &table : nullptr;
  const auto bytes = static_cast<size_t>(channels * width_of(x.type));
  parallel(threads, y.sizes[0] * y.sizes[1], width * channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = (row / y.sizes[1] * x.sizes[1] + index_h[row % y.sizes[1]]) * in_width;
      for (int64_t column = 0; column < width; ++column) {
        const void* const from = at(x.data, x.type, (line + index_w[column]) * channels);
        void* const to = at(y.data, y.type, (row * width + column) * channels);
        if (same) {
          std::memcpy(to, from, bytes);
        } else {
          requantize_run(loops, x, y, codes, from, channels, to);
        }
      }
    }
  });
}

void resize_linear(const char* isa, const Threads& threads, const View& x, const LinearTaps& h, const LinearTaps& w,
                   const View& y) {
  const Loops& loops = find_loops(isa);
  const int64_t channels = x.sizes[3], width = y.sizes[2], in_width = x.sizes[2];
  parallel(threads, y.sizes[0] * y.sizes[1], width * channels * 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / y.sizes[1] * x.sizes[1], i = row % y.sizes[1];
      const int64_t above = (image + h.low[i]) * in_width, below = (image + h.high[i]) * in_width;
      const float to_low = h.weight[i], to_high = 1.0f - to_low;
      for (int64_t j = 0; j < width; ++j) {
        const float left = w.weight[j], right = 1.0f - left;
        // a neighbour weighs what the other one is away
        const float weights[] = {right * to_high, left * to_high, right * to_low, left * to_low};
        for (int64_t c = 0; c < channels; c += tile) {
          const int64_t n = std::min(tile, channels - c);
          const void* const taps[] = {
              at(x.data, x.type, (above + w.low[j]) * channels + c),
              at(x.data, x.type, (above + w.high[j]) * channels + c),
              at(x.data, x.type, (below + w.low[j]) * channels + c),
              at(x.data, x.type, (below + w.high[j]) * channels + c),
          };
          float real[tile];
          loops.blend(x.type, x.grid, taps, weights, n, real);
          loops.quantize(y.type, y.grid, real, n, at(y.data, y.type, (row * width + j) * channels + c));
        }
      }
    }
  });
}

}  // namespace qat
