#include "norm_learned.h"

#include "norm_blocks.h"
#include "norm_parts.h"

namespace qat {
namespace {

// Adds what the elements of a block give; dz is null where it is not wanted.
void add_block(const Kernels& kernels, const float* ds, const float* dz, int64_t n, GridSums& sums) {
  sums.scale += kernels.sum_run(ds, n);
  if (dz != nullptr) sums.zero_point += kernels.sum_run(dz, n);
}

}  // namespace

GridSums learned_gradient_sums(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* x,
                               Layout layout, const NormPass& pass, bool with_zero_point, double* sum,
                               double* product) {
  const NormBlocks blocks(kernels, x, nullptr, nullptr, layout, pass);
  return sum_products(kernels, parallel, x, layout, sum, product,
                      [&](int64_t begin, int64_t end, float* masked, GridSums& sums) {
                        float ds[block], zero_points[block];
                        float* const dz = with_zero_point ? zero_points : nullptr;
                        blocks.gradient(grad + begin, begin, end, masked, ds, dz);
                        add_block(kernels, ds, dz, end - begin, sums);
                      });
}

GridSums add_learned_gradient(const Kernels& kernels, ParallelFor parallel, const float* grad, const float* x,
                              const float* other, float* dx, int64_t n, const NormPass& pass, bool with_zero_point) {
  Parts parts({1, 1, n}, 0);
  std::vector<GridSums> sums(static_cast<size_t>(parts.count()));
  const NormSteps steps{pass.bounds.low, pass.bounds.high, true, pass.grid->scale,
                        static_cast<float>(pass.grid->zero_point), pass.codes, pass.clips};
  NormSteps kept_steps = steps;
  kept_steps.quantize = false;
  const Dropping dropping(kernels, pass.drop);
  parts.run(parallel, [&](int64_t first, int64_t last, double*) {
    GridSums& own = sums[static_cast<size_t>(parts.index_of(first))];
    float total[block], ds[block], zero_points[block];
    float* const dz = with_zero_point ? zero_points : nullptr;
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t length = std::min(begin + block, last) - begin;
      kernels.norm.add_run(x + begin, other + begin, total, length);
      kernels.norm.learned_run(grad + begin, total, dx + begin, ds, dz, length, 1.0f, 0.0f, steps);
      if (dropping.drops()) {
        uint8_t kept_bits[block / 8];
        kernels.norm.norm_run(total, total, kept_bits, length, 1.0f, 0.0f, kept_steps);
        dropping.gradient(begin, begin + length, grad + begin, kept_bits, dx + begin, ds, dz);
      }
      add_block(kernels, ds, dz, length, own);
    }
  });
  return total_of(sums);
}

}  // namespace qat
