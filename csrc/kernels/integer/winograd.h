// Convolutions of 3 x 3 and stride 1 with a quarter of the multiplications, to the same bits: Winograd's F(4 x 4, 3 x 3)
// over the integers modulo 2^32.
//
// Sixteen outputs y of a tile come of the 36 pixels d below it and the nine weights w, for each input channel,
//   y = A^T [(G w G^T) * (B^T d B)] A,
// where G has thirds and eighths. Those are taken out: with integer rows G' the same A', made of A, gives multiples of the
// outputs, (3 * 2^a_i) (3 * 2^a_j) y_ij. All of it is additions and multiplications, so it is exact modulo 2^32 whatever
// wraps around in between; 9 has an inverse there, and the power of two, 2^6 at most, is shifted out of a sum whose
// absolute value the weights prove to be below 2^25. Transformed activations are 100 * 255 at most and weights 49 * 128, so
// both are words, and the 36 products of matrices are those of words.
#pragma once

#include <cstdint>
#include <memory>

#include "conv.h"
#include "pack.h"

namespace qat {

class Winograd {
 public:
  // Null where the instruction set, the layer or its shape has no use for it. `bytes`: the kernels can make the codes.
  // `multiplier`: one a padded column, as long lived as the result, as `weights` and `table` (or null) are.
  static std::unique_ptr<const Winograd> prepare(const PackedWeights& weights, const ConvShape& shape, Type x,
                                                 const Grid& x_grid, const Epilogue& epilogue,
                                                 const ByteEpilogue& byte_epilogue, const float* multiplier,
                                                 const uint8_t* table);

  int64_t scratch(int32_t threads) const;
  void run(const Threads& threads, const uint8_t* x, uint8_t* y, const uint8_t* residual, void* scratch) const;

 private:
  struct Call;
  struct Range;
  Winograd() = default;
  int64_t slot_bytes() const;
  int64_t word_stride(int64_t tiles) const;
  // Where a tile lies in y, and the pixels of x below it.
  WinogradTile place(int64_t tile, const uint8_t* x, const uint8_t** pixels) const;
  void run_block(const Call& call, int64_t first, int64_t tiles, const Range& panels, int8_t* slot) const;

  const PackedWeights* weights_;
  const WinogradWeights* words_;
  ConvShape shape_;
  ByteEpilogue epilogue_;
  const float* multiplier_;
  const uint8_t* table_;
  uint8_t flip_;
  int16_t zero_;  // of the codes after the flip
  std::vector<uint8_t> padding_;
  std::vector<int32_t> bias_;  // one a padded column
  int64_t tiles_h_, tiles_w_;
  int64_t block_tiles_;
};

}  // namespace qat
