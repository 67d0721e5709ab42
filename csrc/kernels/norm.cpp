#include "norm.h"

#include <mutex>

#include "norm_blocks.h"

namespace qat {
namespace {

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

}  // namespace

void channel_moments(const Kernels& kernels, ParallelFor parallel, const float* x, Layout layout,
                     const Moments& moments) {
  const NormKernels& k = kernels.norm;
  const int64_t channels = layout.channels;
  std::fill_n(moments.low, channels, std::numeric_limits<float>::infinity());
  std::fill_n(moments.high, channels, -std::numeric_limits<float>::infinity());
  Parts parts(layout, 2);
  std::mutex mutex;
  parts.run(parallel, [&](int64_t begin, int64_t end, double* sums) {
    std::vector<float> extrema(static_cast<size_t>(2 * channels));
    float *low = extrema.data(), *high = low + channels;
    std::fill_n(low, channels, std::numeric_limits<float>::infinity());
    std::fill_n(high, channels, -std::numeric_limits<float>::infinity());
    double* const squares = sums + channels;
    over_channels(
        layout, begin, end,
        [&](int64_t at, int64_t rows, int64_t c, int64_t count) {
          k.moments_rows(x + at, rows, count, sums + c, squares + c, low + c, high + c);
        },
        [&](int64_t at, int64_t c, int64_t n) { k.moments_run(x + at, n, sums + c, squares + c, low + c, high + c); });
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t c = 0; c < channels; ++c) {
      moments.low[c] = std::min(moments.low[c], low[c]);
      moments.high[c] = std::max(moments.high[c], high[c]);
    }
  });
  parts.total(0, moments.sum);
  parts.total(1, moments.square);
}

void norm_quantize(const Kernels& kernels, ParallelFor parallel, const float* x, float* y, uint8_t* bits, Layout layout,
                   const NormPass& pass) {
  const NormBlocks blocks(kernels, x, y, bits, layout, pass);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += block) blocks.write(begin, std::min(begin + block, last));
  });
}

void add_tensors(const Kernels& kernels, ParallelFor parallel, const float* x, const float* other, float* y, int64_t n,
                 const ExtremaOut* extrema) {
  const Layout layout{1, 1, n};
  std::mutex mutex;
  over_blocks(parallel, n, grain, [&](int64_t first, int64_t last) {
    LocalExtrema local(layout);
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      kernels.norm.add_run(x + begin, other + begin, y + begin, end - begin);
      if (extrema != nullptr) local.widen(kernels.f32, y + begin, begin, end);
    }
    if (extrema == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    local.merge_into(*extrema);
  });
}

void gradient_sums(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   Layout layout, double* sum, double* product) {
  const NormKernels& k = kernels.norm;
  Parts parts(layout, 2);
  parts.run(parallel, [&](int64_t first, int64_t last, double* sums) {
    double* const products = sums + layout.channels;
    float masked[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      kernels.f32.mask_run(grad + begin, bits + begin / 8, masked, end - begin);
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
}

void norm_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const uint8_t* bits, const float* x,
                   float* dx, Layout layout, const NormGradient& g) {
  const NormKernels& k = kernels.norm;
  const std::vector<float> zeros(static_cast<size_t>(g.slope == nullptr ? layout.channels : 0));
  const float* const slope = g.slope == nullptr ? zeros.data() : g.slope;
  const float* const center = g.slope == nullptr ? zeros.data() : g.center;
  const float* const offset = g.slope == nullptr ? zeros.data() : g.offset;
  const bool plain = g.slope == nullptr;
  const Spread factors(layout, g.factor), slopes(layout, slope), centers(layout, center), offsets(layout, offset);
  over_blocks(parallel, layout.size(), grain, [&](int64_t first, int64_t last) {
    float masked[block], a[block], b[block], c[block], d[block];
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last), n = end - begin;
      kernels.f32.mask_run(grad + begin, bits + begin / 8, masked, n);
      if (plain) {
        // x is not read: an infinity in it must not become nan
        kernels.f32.multiply_each(masked, factors.of(begin, end, a), dx + begin, n);
        continue;
      }
      by_block(
          layout, begin, end,
          [&](int64_t i) {
            k.gradient_run(masked, x + begin, dx + begin, n, g.factor[i], slope[i], center[i], offset[i]);
          },
          [&] {
            k.gradient_each(masked, x + begin, dx + begin, n, factors.of(begin, end, a), slopes.of(begin, end, b),
                            centers.of(begin, end, c), offsets.of(begin, end, d));
          });
    }
  });
}

}  // namespace qat
