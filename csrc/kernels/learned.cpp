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

}  // namespace

template <class T>
void learned_gradient(const Kernels& kernels, ParallelFor parallel, const T* grad, const T* x, T* dx, Layout layout,
                      const float* scale, const float* zero_point, Range range, const GridGradient& sums) {
  const TypedKernels<T>& k = typed<T>(kernels);
  const BlockGrids grids(layout, scale, zero_point);
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
      grids.with(
          begin, end,
          [&](float s, float z) {
            k.learned_run(grad + begin, x + begin, dx + begin, ds, dz, end - begin, s, z, range);
          },
          [&](const float* s, const float* z) {
            k.learned_each(grad + begin, x + begin, dx + begin, ds, dz, end - begin, s, z, range);
          });
      scales.add(ds, begin, end);
      zero_points.add(dz, begin, end);
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
      sums.zero_point[c] += own[channels + c];
    }
  }
}

#define QAT_INSTANTIATE(T)                                                                                         \
  template void learned_gradient<T>(const Kernels&, ParallelFor, const T*, const T*, T*, Layout, const float*,      \
                                    const float*, Range, const GridGradient&);
QAT_INSTANTIATE(float)
QAT_INSTANTIATE(uint16_t)
#undef QAT_INSTANTIATE

}  // namespace qat
