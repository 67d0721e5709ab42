// The pass of norm.h that writes, block by block: for whoever does something else with a block while it is in the cache.
#pragma once

#include "blocks.h"
#include "dropping.h"
#include "norm.h"

namespace qat {

// A block of one channel gets run(channel), any other each().
template <class Run, class Each>
void by_block(const Layout& layout, int64_t begin, int64_t end, const Run& run, const Each& each) {
  const int64_t index = begin / layout.inner;
  if ((end - 1) / layout.inner == index) {
    run(index % layout.channels);
  } else {
    each();
  }
}

class NormBlocks {
 public:
  NormBlocks(const Kernels& kernels, const float* x, float* y, uint8_t* bits, const Layout& layout,
             const NormPass& pass)
      : kernels_(kernels.norm), x_(x), y_(y), bits_(bits), layout_(layout), factor_(pass.factor), shift_(pass.shift),
        factors_(layout, pass.factor), shifts_(layout, pass.shift),
        steps_{pass.bounds.low, pass.bounds.high, pass.grid != nullptr, 1.0f, 0.0f, pass.codes, pass.clips},
        kept_steps_(steps_), dropping_(kernels, pass.grid == nullptr ? nullptr : pass.drop) {
    kept_steps_.quantize = false;
    if (pass.grid == nullptr) return;
    steps_.scale = pass.grid->scale;
    steps_.zero_point = static_cast<float>(pass.grid->zero_point);
  }

  void write(int64_t begin, int64_t end) const {
    uint8_t* const to = bits_ == nullptr ? nullptr : bits_ + begin / 8;
    if (!dropping_.drops()) {
      run(begin, end, y_ + begin, to, steps_);
      return;
    }
    float kept[block];
    uint8_t kept_bits[block / 8];
    run(begin, end, kept, kept_bits, kept_steps_);  // first: y may be x
    run(begin, end, y_ + begin, to, steps_);
    dropping_.keep(begin, end, kept, kept_bits, y_ + begin, to);
  }

  // The gradient of a block where it passes, and what its elements add to those of the grid; dz may be null.
  void gradient(const float* grad, int64_t begin, int64_t end, float* masked, float* ds, float* dz) const {
    const int64_t n = end - begin;
    by_block(
        layout_, begin, end,
        [&](int64_t c) {
          kernels_.learned_run(grad, x_ + begin, masked, ds, dz, n, factor_[c], shift_[c], steps_);
        },
        [&] {
          float factor[block], shift[block];
          kernels_.learned_each(grad, x_ + begin, masked, ds, dz, n, factors_.of(begin, end, factor),
                                shifts_.of(begin, end, shift), steps_);
        });
    if (!dropping_.drops()) return;
    float kept[block];
    uint8_t kept_bits[block / 8];
    run(begin, end, kept, kept_bits, kept_steps_);
    dropping_.gradient(begin, end, grad, kept_bits, masked, ds, dz);
  }

 private:
  void run(int64_t begin, int64_t end, float* y, uint8_t* bits, const NormSteps& steps) const {
    const int64_t n = end - begin;
    by_block(
        layout_, begin, end,
        [&](int64_t c) { kernels_.norm_run(x_ + begin, y, bits, n, factor_[c], shift_[c], steps); },
        [&] {
          float factor[block], shift[block];
          kernels_.norm_each(x_ + begin, y, bits, n, factors_.of(begin, end, factor), shifts_.of(begin, end, shift),
                             steps);
        });
  }

  const NormKernels& kernels_;
  const float* x_;
  float* y_;
  uint8_t* bits_;
  Layout layout_;
  const float *factor_, *shift_;
  Spread factors_, shifts_;
  NormSteps steps_, kept_steps_;
  Dropping dropping_;
};

}  // namespace qat
