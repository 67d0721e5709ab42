// QDrop in blocks: what a block is without fake quantization, where its elements keep that.
#pragma once

#include "blocks.h"
#include "norm.h"

namespace qat {

class Dropping {
 public:
  Dropping(const Kernels& kernels, const Drop* drop) : kernels_(kernels), drop_(drop) {}

  bool drops() const { return drop_ != nullptr; }

  // Gives elements of [begin, end) the value and the bit (`bits` may be null) that they have without fake quantization.
  void keep(int64_t begin, int64_t end, const float* kept, const uint8_t* kept_bits, float* y, uint8_t* bits) const {
    float numbers[block];
    fill(begin, end, numbers);
    kernels_.drop.keep_run(numbers, drop_->threshold, kept, kept_bits, y, bits, end - begin);
  }

  // Their gradient passes where `kept_bits` let it, and has no part in that of the grid. dz may be null.
  void gradient(int64_t begin, int64_t end, const float* grad, const uint8_t* kept_bits, float* dx, float* ds,
                float* dz) const {
    static constexpr float zeros[block] = {};
    const int64_t n = end - begin;
    float numbers[block], passed[block];
    fill(begin, end, numbers);
    kernels_.f32.mask_run(grad, kept_bits, passed, n);
    kernels_.drop.keep_run(numbers, drop_->threshold, passed, nullptr, dx, nullptr, n);
    kernels_.drop.keep_run(numbers, drop_->threshold, zeros, nullptr, ds, nullptr, n);
    if (dz != nullptr) kernels_.drop.keep_run(numbers, drop_->threshold, zeros, nullptr, dz, nullptr, n);
  }

 private:
  void fill(int64_t begin, int64_t end, float* numbers) const {
    // a block is no longer than the alignment of its first place, so the upper half of the places is one
    kernels_.drop.place_numbers(drop_key(drop_->seed, begin), begin, numbers, end - begin);
  }

  const Kernels& kernels_;
  const Drop* drop_;
};

// The numbers of the places [0, n).
void place_numbers(const Kernels& kernels, ParallelFor parallel, int64_t seed, float* out, int64_t n);

}  // namespace qat
