#include "learned.h"

#include "blocks.h"

namespace qat {
namespace {

// The sums of one part of a tensor.
class PartSums {
 public:
  PartSums(const Kernels& kernels, const Layout& layout, double* sums)
      : kernels_(kernels), layout_(layout), sums_(sums) {}

  // x: the elements from `begin` on.
  void add(const float* x, int64_t begin, int64_t end) {
    if (layout_.inner == 1 && layout_.channels > 1) {
      while (begin < end) {
        const int64_t channel = begin % layout_.channels, count = std::min(layout_.channels - channel, end - begin);
        kernels_.sum_each(x, count, sums_ + channel);
        x += count;
        begin += count;
      }
      return;
    }
    over_runs(layout_, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      sums_[channel] += kernels_.sum_run(x + (from - begin), to - from);
    });
  }

 private:
  const Kernels& kernels_;
  Layout layout_;
  double* sums_;
};

// make(begin, end, ds, dz) writes the gradients of a block, whose last two are added to `sums`.
template <class Make>
void sum_parts(const Kernels& kernels, ParallelFor parallel, const Layout& layout, const GridGradient& sums,
               const Make& make) {
  const int64_t n = layout.size(), channels = layout.channels;
  // large enough that the sums of all parts are small beside the tensor
  const int64_t part = std::max(grain, blocks_of(64 * channels)) * block, parts = (n + part - 1) / part;
  std::vector<double> partial(static_cast<size_t>(2 * channels * parts));
  auto one = [&](int64_t index) {
    float ds[block], dz[block];
    double* const own = partial.data() + 2 * channels * index;
    PartSums scales(kernels, layout, own), zero_points(kernels, layout, own + channels);
    const int64_t last = std::min((index + 1) * part, n);
    for (int64_t begin = index * part; begin < last; begin += block) {
      const int64_t end = std::min(begin + block, last);
      make(begin, end, ds, dz);
      scales.add(ds, begin, end);
      if (sums.zero_point != nullptr) zero_points.add(dz, begin, end);
    }
  };
  using One = decltype(one);
  const auto task = [](int64_t first, int64_t last, void* context) {
    for (int64_t index = first; index < last; ++index) (*static_cast<One*>(context))(index);
  };
  parallel(0, parts, 1, task, &one);
  for (int64_t index = 0; index < parts; ++index) {
    const double* const own = partial.data() + 2 * channels * index;
    for (int64_t c = 0; c < channels; ++c) {
      sums.scale[c] += own[c];
      if (sums.zero_point != nullptr) sums.zero_point[c] += own[channels + c];
    }
  }
}

// Weights whose channels are rows of memory, with a factor each: y = fake_quantize(w f) / f, so the sums of a row are
// divided by its factor.
template <class T>
void learned_rows(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* w, T* dw, const Layout& layout,
                  const float* factor, const float* scale, const float* zero_point, Range range,
                  const GridGradient& sums) {
  const TypedKernels<T>& k = typed<T>(kernels);
  auto one = [&](int64_t row) {
    float ds[block], buffer[block];
    float* const dz = sums.zero_point != nullptr ? buffer : nullptr;
    const double f = static_cast<double>(factor[row]);
    double of_scale = 0.0, of_zero_point = 0.0;
    const int64_t last = (row + 1) * layout.inner;
    for (int64_t begin = row * layout.inner; begin < last; begin += block) {
      const int64_t n = std::min(block, last - begin);
      k.weight_learned_run(grad + begin, w + begin, dw + begin, ds, dz, n, factor[row], scale[row], zero_point[row],
                           range);
      of_scale += kernels.sum_run(ds, n);
      if (dz != nullptr) of_zero_point += kernels.sum_run(dz, n);
    }
    sums.scale[row] = of_scale / f;
    if (dz != nullptr) sums.zero_point[row] = of_zero_point / f;
  };
  using One = decltype(one);
  const auto task = [](int64_t first, int64_t last, void* context) {
    for (int64_t row = first; row < last; ++row) (*static_cast<One*>(context))(row);
  };
  parallel(0, layout.channels, std::max<int64_t>(1, grain * block / layout.inner), task, &one);
}

}  // namespace

template <class T>
void learned_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* x, T* dx, Layout layout,
                      const float* scale, const float* zero_point, Range range, const GridGradient& sums,
                      bool clips) {
  const TypedKernels<T>& k = typed<T>(kernels);
  const BlockGrids grids(layout, scale, zero_point);
  sum_parts(kernels, parallel, layout, sums, [&](int64_t begin, int64_t end, float* ds, float* dz) {
    grids.with(
        begin, end,
        [&](float s, float z) {
          k.learned_run(grad + begin, x + begin, dx + begin, ds, dz, end - begin, s, z, range, clips);
        },
        [&](const float* s, const float* z) {
          k.learned_each(grad + begin, x + begin, dx + begin, ds, dz, end - begin, s, z, range, clips);
        });
  });
}

template <class T>
void learned_weight_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* w, T* dw,
                             Layout layout, const Factor& factor, const float* scale, const float* zero_point,
                             Range range, const GridGradient& sums) {
  const Layout& by = factor.layout;
  const bool of_channel = by.outer == layout.outer && by.channels == layout.channels && by.inner == layout.inner;
  if (of_channel && layout.outer == 1) {
    learned_rows(kernels, parallel, grad, w, dw, layout, factor.values, scale, zero_point, range, sums);
    return;
  }
  const TypedKernels<T>& k = typed<T>(kernels);
  const BlockGrids grids(layout, scale, zero_point);
  const Spread factors(by, factor.values);
  float ones[block];
  std::fill_n(ones, block, 1.0f);
  sum_parts(kernels, parallel, layout, sums, [&](int64_t begin, int64_t end, float* ds, float* dz) {
    const int64_t n = end - begin;
    float folded[block], spread[block], gradient[block];
    const float* const f = factors.of(begin, end, spread);
    k.multiply_each(w + begin, f, folded, n);
    k.multiply_each(grad + begin, ones, gradient, n);
    grids.with(
        begin, end,
        [&](float s, float z) { kernels.f32.learned_run(gradient, folded, gradient, ds, dz, n, s, z, range, false); },
        [&](const float* s, const float* z) {
          kernels.f32.learned_each(gradient, folded, gradient, ds, dz, n, s, z, range, false);
        });
    k.divide_each(gradient, ones, dw + begin, n);
    kernels.f32.divide_each(ds, f, ds, n);
    if (sums.zero_point != nullptr) kernels.f32.divide_each(dz, f, dz, n);
  });
}

#define QAT_INSTANTIATE(T)                                                                                          \
  template void learned_gradient<T>(const Kernels&, ParallelFor, const T*, const T*, T*, Layout, const float*,       \
                                    const float*, Range, const GridGradient&, bool);                                 \
  template void learned_weight_gradient<T>(const Kernels&, ParallelFor, const T*, const T*, T*, Layout,              \
                                           const Factor&, const float*, const float*, Range, const GridGradient&);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
