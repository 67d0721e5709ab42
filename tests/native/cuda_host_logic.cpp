// The logic of csrc/cuda on the host: maps of bins and elements, tile products through the fragments' maps.
#include <vector>

#include "../../csrc/cuda/bins.h"
#include "../../csrc/cuda/elements.h"
#include "../../csrc/cuda/fragments.h"
#include "../../csrc/cuda/gather.h"
#include "../../csrc/cuda/requantize.h"
#include "../../csrc/cuda/walk.h"

using namespace qat::cuda;

namespace {

int32_t x_code(const uint8_t* x, const ConvShape& s, const Row& row, int32_t group, int32_t k, int32_t zero,
               bool is_signed) {
  const Element e = gather(s, row, group, k);
  if (e.source == Source::zero) return 0;
  return e.source == Source::padding ? zero : code_of(x[e.offset], is_signed);
}

// ldmatrix.x4: the lane holds row lane / 4, bytes 4 * (lane % 4) ... of matrix j, whose rows the lanes 8j ... 8j + 7 name.
template <class Source>
uint8_t loaded(const std::vector<uint8_t>& tile, int lane, int matrix, int byte, int first_row, int k, Source source) {
  const Position from = source(8 * matrix + lane / 4);
  return tile[static_cast<size_t>(tile_offset(first_row + from.row, 2 * k + from.column) + 4 * (lane % 4) + byte)];
}

}  // namespace

extern "C" {

// How many bins have a private counter; -1 where the maps are not each other's inverse, or leave the table.
int private_count(int mantissa_bits) {
  const Bins bins(mantissa_bits);
  int kept = 0;
  for (uint32_t bin = 0; bin < bins.count(); ++bin) {
    const int slot = bins.slot(bin);
    if (slot >= 2 * bins.half || 2 * bins.half > private_bins || (slot >= 0 && bins.bin(slot) != bin)) return -1;
    kept += slot >= 0;
  }
  return kept;
}

// Whether the walks of a channel's threads visit each of its elements once.
int visits_once(int64_t outer, int64_t channels, int64_t inner, int64_t step) {
  std::vector<int> seen(static_cast<size_t>(outer * channels * inner));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t thread = 0; thread < step; ++thread) {
      Walk walk({outer, channels, inner}, c, thread, step);
      for (int64_t p = thread; p < outer * inner; p += step, walk.next()) {
        if (walk.at / inner % channels != c) return 0;
        ++seen[static_cast<size_t>(walk.at)];
      }
    }
  }
  for (const int count : seen) {
    if (count != 1) return 0;
  }
  return 1;
}

// Rows and columns of C = A (16 x 64) B (64 x 16) of one warp, through shared memory, ldmatrix and the fragments' maps.
void tile_product(const uint8_t* a, const int8_t* b_rows, int32_t* c) {
  std::vector<uint8_t> left(16 * tile_k), right(16 * tile_k);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < tile_k; ++k) {
      const auto at = static_cast<size_t>(tile_offset(row, k / chunk) + k % chunk);
      left[at] = a[row * tile_k + k];
      right[at] = static_cast<uint8_t>(b_rows[row * tile_k + k]);
    }
  }
  for (int k = 0; k < tile_k / mma_k; ++k) {
    for (int j = 0; j < 2; ++j) {
      uint8_t fa[16][32];
      int8_t fb[32][8];
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 16; ++i) {
          const Position p = a_position(lane, i);
          fa[p.row][p.column] = loaded(left, lane, i / 4, i % 4, 0, k, a_source);
        }
        for (int i = 0; i < 8; ++i) {
          const Position p = b_position(lane, i);
          fb[p.row][p.column] = static_cast<int8_t>(loaded(right, lane, 2 * j + i / 4, i % 4, 0, k, b_source));
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const Position p = c_position(lane, i);
          for (int d = 0; d < mma_k; ++d) c[p.row * 16 + 8 * j + p.column] += fa[p.row][d] * fb[d][p.column];
        }
      }
    }
  }
}

// Distinct banks of 16 bytes that each phase of ldmatrix touches, the fewest.
int fewest_banks() {
  int fewest = 8;
  for (int first = 0; first < 16; first += 8) {
    for (int c = 0; c < chunks; ++c) {
      uint32_t seen = 0;
      for (int row = 0; row < 8; ++row) seen |= 1u << (tile_offset(first + row, c) / chunk % 8);
      int banks = 0;
      for (; seen != 0; seen &= seen - 1) ++banks;
      if (banks < fewest) fewest = banks;
    }
  }
  return fewest;
}

// `shape`: the fields of ConvShape. `grid`: the fields of Requantize that are integers, `ratios` its floats.
void conv(const uint8_t* x, int x_signed, int32_t x_zero_point, const int8_t* weight, const int32_t* bias,
          const float* multiplier, const int32_t* shape, const int32_t* grid, const float* ratios,
          const uint8_t* residual, uint8_t* y) {
  const ConvShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8],
                    shape[9], shape[10], shape[11], shape[12], shape[13], shape[14], shape[15]};
  const Requantize r{grid[0], grid[1], grid[2], grid[3] != 0, grid[4] != 0, grid[5] != 0, grid[6] != 0,
                     ratios[0], ratios[1], ratios[2], grid[7], grid[8]};
  const int32_t depth = s.depth();
  for (int64_t m = 0; m < s.rows(); ++m) {
    const Row row = row_of(s, m);
    for (int32_t o = 0; o < s.groups * s.outputs; ++o) {
      int32_t sum = 0, weights = 0;
      for (int32_t k = 0; k < depth; ++k) {
        const int32_t w = weight[int64_t{o} * depth + k];
        sum += w * x_code(x, s, row, o / s.outputs, k, x_zero_point, x_signed != 0);
        weights += w;
      }
      const int32_t acc = sum + bias[o] - x_zero_point * weights;
      const int64_t at = m * s.groups * s.outputs + o;
      int32_t code = requantize(acc, multiplier[o], r);
      if (r.add) code = add_codes(code, code_of(residual[at], r.residual_signed), r);
      y[at] = static_cast<uint8_t>(code);
    }
  }
}

}  // extern "C"
