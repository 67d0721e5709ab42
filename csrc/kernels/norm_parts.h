// Sums by channel of the passes of norm.h: over parts of a tensor, so that no number of threads changes a bit.
#pragma once

#include "blocks.h"
#include "norm_learned.h"

namespace qat {

// Sums by channel over parts of a tensor, `width` values a channel and part, whatever thread has which part.
class Parts {
 public:
  Parts(const Layout& layout, int64_t width)
      : layout_(layout),
        width_(width),
        // large enough that the sums of all parts are small beside the tensor
        size_(std::max(grain, blocks_of(64 * layout.channels)) * block),
        count_((layout.size() + size_ - 1) / size_),
        sums_(static_cast<size_t>(width * layout.channels * count_)) {}

  int64_t count() const { return count_; }
  // The part that begins with an element.
  int64_t index_of(int64_t element) const { return element / size_; }

  // function(begin, end, sums of this part) for every part.
  template <class Function>
  void run(ParallelFor parallel, const Function& function) {
    struct Context {
      Parts* parts;
      const Function* function;
    } context{this, &function};
    const auto task = [](int64_t begin, int64_t end, void* pointer) {
      const auto* c = static_cast<Context*>(pointer);
      for (int64_t i = begin; i < end; ++i) c->parts->one(i, *c->function);
    };
    parallel(0, count_, 1, task, &context);
  }

  // Sum number `index` of all channels.
  void total(int64_t index, double* out) const {
    const int64_t channels = layout_.channels;
    std::fill_n(out, channels, 0.0);
    for (int64_t part = 0; part < count_; ++part) {
      const double* const own = sums_.data() + (part * width_ + index) * channels;
      for (int64_t c = 0; c < channels; ++c) out[c] += own[c];
    }
  }

 private:
  template <class Function>
  void one(int64_t i, const Function& function) {
    function(i * size_, std::min((i + 1) * size_, layout_.size()), sums_.data() + i * width_ * layout_.channels);
  }

  Layout layout_;
  int64_t width_, size_, count_;
  std::vector<double> sums_;
};

// Elements [begin, end) as whole or broken rows of channels: rows(offset of the first element, rows, first channel,
// channels), or as stretches of one channel: stretch(offset, channel, length).
template <class Rows, class Stretch>
void over_channels(const Layout& layout, int64_t begin, int64_t end, const Rows& rows, const Stretch& stretch) {
  if (layout.inner != 1 || layout.channels == 1) {
    over_runs(layout, begin, end,
              [&](int64_t channel, int64_t from, int64_t to) { stretch(from, channel, to - from); });
    return;
  }
  const int64_t channels = layout.channels;
  while (begin < end) {
    const int64_t channel = begin % channels;
    const int64_t whole = channel == 0 ? (end - begin) / channels : 0;
    const int64_t count = whole > 0 ? channels : std::min(channels - channel, end - begin);
    const int64_t number = whole > 0 ? whole : 1;
    rows(begin, number, channel, count);
    begin += number * count;
  }
}

inline GridSums total_of(const std::vector<GridSums>& parts) {
  GridSums total{0.0, 0.0};
  for (const GridSums& part : parts) {
    total.scale += part.scale;
    total.zero_point += part.zero_point;
  }
  return total;
}

// Sums by channel of a masked gradient, and of its products with x. make(begin, end, masked, grid) writes a block of it,
// and adds to the sums of its part, of which the result is the total.
template <class Make>
GridSums sum_products(const Kernels& kernels, ParallelFor parallel, const float* x, const Layout& layout, double* sum,
                      double* product, const Make& make) {
  const NormKernels& k = kernels.norm;
  Parts parts(layout, 2);
  std::vector<GridSums> grids(static_cast<size_t>(parts.count()));
  parts.run(parallel, [&](int64_t first, int64_t last, double* sums) {
    double* const products = sums + layout.channels;
    GridSums& grid = grids[static_cast<size_t>(parts.index_of(first))];
    float masked[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      make(begin, end, masked, grid);
      over_channels(
          layout, begin, end,
          [&](int64_t at, int64_t rows, int64_t c, int64_t count) {
            k.products_rows(masked + (at - begin), x + at, rows, count, sums + c, products + c);
          },
          [&](int64_t at, int64_t c, int64_t n) {
            k.products_run(masked + (at - begin), x + at, n, sums + c, products + c);
          });
    }
  });
  parts.total(0, sum);
  parts.total(1, product);
  return total_of(grids);
}

}  // namespace qat
