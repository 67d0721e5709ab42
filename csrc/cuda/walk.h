// The elements of one channel in memory.
#pragma once

#include "elements.h"

namespace qat::cuda {

// Positions begin, begin + step, ... among the outer * inner of a channel; `at` is the offset in memory. Divisions are only
// at the beginning.
struct Walk {
  int64_t at;

  QAT_HD Walk(Layout layout, int64_t channel, int64_t begin, int64_t step)
      : at((begin / layout.inner * layout.channels + channel) * layout.inner + begin % layout.inner),
        position_(begin % layout.inner),
        inner_(layout.inner),
        step_(step % layout.inner),
        jump_(step / layout.inner * layout.channels * layout.inner + step_),
        skip_((layout.channels - 1) * layout.inner) {}

  QAT_HD void next() {
    at += jump_;
    position_ += step_;
    if (position_ < inner_) return;
    position_ -= inner_;
    at += skip_;
  }

 private:
  int64_t position_, inner_, step_, jump_, skip_;
};

}  // namespace qat::cuda
