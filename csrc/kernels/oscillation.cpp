#include "oscillation.h"

#include "blocks.h"

namespace qat {

void oscillation_step(const Kernels& kernels, ParallelFor parallel, float* weight, const OscillationState& state,
                      int64_t rows, int64_t inner, const float* scale, const float* zero_point, bool by_row,
                      const float* factor, Range codes, const OscillationRule& rule) {
  const auto some = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t grid = by_row ? row : 0, at = row * inner;
      const OscillationState own{state.codes + at,     state.direction + at, state.average + at,
                                 state.frequency + at, state.frozen + at,    state.held + at};
      kernels.oscillation.run(weight + at, own, inner, factor == nullptr ? 1.0f : factor[row], scale[grid],
                              zero_point[grid], codes, rule);
    }
  };
  const auto task = [](int64_t first, int64_t last, void* context) {
    (*static_cast<decltype(some)*>(context))(first, last);
  };
  parallel(0, rows, std::max<int64_t>(1, grain * block / inner), task, const_cast<void*>(static_cast<const void*>(&some)));
}

}  // namespace qat
