#include "winograd.h"

#include <algorithm>
#include <cstring>

#include "parts.h"

namespace qat {
namespace {

constexpr int64_t positions = winograd_positions;
constexpr int64_t size = winograd_size, patch = winograd_patch;
// Transformed together: enough rows for a panel of weights, and not much more than the second-level cache has room for.
constexpr int64_t most_tiles = 48;
// A sum below this keeps its value when it is multiplied by 2^6.
constexpr int64_t sum_limit = int64_t{1} << 25;

int64_t rounded(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// G' w G'^T of nine weights.
void transform(const int32_t w[9], int16_t to[positions]) {
  constexpr int32_t rows[patch][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};
  for (int64_t i = 0; i < patch; ++i) {
    int32_t line[3];
    for (int j = 0; j < 3; ++j) line[j] = rows[i][0] * w[j] + rows[i][1] * w[3 + j] + rows[i][2] * w[6 + j];
    for (int64_t j = 0; j < patch; ++j) {
      to[i * patch + j] =
          static_cast<int16_t>(line[0] * rows[j][0] + line[1] * rows[j][1] + line[2] * rows[j][2]);
    }
  }
}

// Cycles of a processor of AVX2, with and without: what decides.
bool pays(const PackedWeights& w, const ConvShape& s, int64_t tiles) {
  const double c = w.inputs, o = w.padded;
  const double direct = static_cast<double>(s.batch) * s.out_h * s.out_w * 9 * c * o / 24;
  const double transforms = static_cast<double>(tiles) * (c * 10 + o * 18);
  const double products = static_cast<double>(tiles) * 36 * c * o / 25;
  // of a cache that holds no network
  const double memory = 72 * c * o / 6;
  return transforms + products + memory < 0.8 * direct;
}

}  // namespace

struct Winograd::Call {
  const uint8_t* x;
  uint8_t* y;
  const uint8_t* residual;
};

struct Winograd::Range {
  int64_t begin, end;
};

WinogradWeights::WinogradWeights(const PackedWeights& w) : sums_above(w.outputs), sums_below(w.outputs) {
  const int64_t steps = (w.depth + 1) / 2;
  const int32_t group = w.kernels->group();
  panel_words = positions * steps * 2 * unit_columns;
  data = AlignedBytes(w.panels.size() * static_cast<size_t>(panel_words) * 2);
  auto* words = reinterpret_cast<int16_t*>(data.data());
  for (size_t p = 0; p < w.panels.size(); ++p) {
    const Panel& panel = w.panels[p];
    for (int32_t c = 0; c < panel.columns; ++c) {
      const auto output = static_cast<size_t>(panel.first + c);
      for (int64_t k = 0; k < w.depth; ++k) {
        int32_t taps[9];
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t at = (t * w.steps + k / group) * unit_columns + c;
          taps[t] = w.data.data()[panel.offset + at * group + k % group];
          (taps[t] > 0 ? sums_above : sums_below)[output] += taps[t];
        }
        int16_t made[positions];
        transform(taps, made);
        for (int64_t i = 0; i < positions; ++i) {
          const int64_t at = ((static_cast<int64_t>(p) * positions + i) * steps + k / 2) * unit_columns + c;
          words[at * 2 + k % 2] = made[i];
        }
      }
    }
  }
}

const WinogradWeights& PackedWeights::winograd() const {
  std::call_once(winograd_once_, [&] { winograd_ = std::make_unique<WinogradWeights>(*this); });
  return *winograd_;
}

std::unique_ptr<const Winograd> Winograd::prepare(const PackedWeights& w, const ConvShape& s, Type x, const Grid& x_grid,
                                                  const Epilogue& epilogue, const ByteEpilogue& byte_epilogue,
                                                  const float* multiplier, const uint8_t* table) {
  const bool fits = w.kernels->winograd != nullptr && w.method == Method::gemm && w.groups == 1 && w.kernel_h == 3 &&
                    w.kernel_w == 3 && !s.transposed && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
                    s.dilation_w == 1;
  if (!fits) return nullptr;
  const int64_t tiles_h = (s.out_h + size - 1) / size, tiles_w = (s.out_w + size - 1) / size;
  const int64_t tiles = s.batch * tiles_h * tiles_w;
  if (!pays(w, s, tiles)) return nullptr;
  const WinogradWeights& words = w.winograd();
  const int64_t low = (x == Type::s8 ? -128 : 0) - x_grid.zero_point, high = low + 255;
  for (size_t o = 0; o < words.sums_above.size(); ++o) {
    const int64_t above = words.sums_above[o], below = words.sums_below[o];
    if (above * high + below * low >= sum_limit || above * low + below * high <= -sum_limit) return nullptr;
  }

  std::unique_ptr<Winograd> made(new Winograd);
  Winograd& l = *made;
  l.weights_ = &w;
  l.words_ = &words;
  l.shape_ = s;
  l.epilogue_ = byte_epilogue;
  l.multiplier_ = multiplier;
  l.table_ = table;
  l.flip_ = x == Type::s8 ? 0x80 : 0;
  l.zero_ = static_cast<int16_t>(-low);
  l.padding_.assign(static_cast<size_t>(w.inputs) + 64, static_cast<uint8_t>(x_grid.zero_point));
  l.bias_.assign(static_cast<size_t>(w.padded), 0);
  for (const Panel& panel : w.panels) {
    for (int32_t c = 0; c < panel.columns && !epilogue.bias.empty(); ++c) {
      l.bias_[static_cast<size_t>(panel.padded + c)] = epilogue.bias[static_cast<size_t>(panel.first + c)];
    }
  }
  l.tiles_h_ = tiles_h;
  l.tiles_w_ = tiles_w;
  l.block_tiles_ = std::min(rounded(tiles, 6), most_tiles);
  return made;
}

// Words of one position, and some so that positions do not share the sets of a cache.
int64_t Winograd::word_stride(int64_t tiles) const { return tiles * rounded(weights_->inputs, unit_columns) + 32; }

int64_t Winograd::slot_bytes() const {
  const int64_t pointers = rounded(block_tiles_ * 8, 64);
  const int64_t pixels = rounded(positions * 8, 64);
  const int64_t where = rounded(block_tiles_ * static_cast<int64_t>(sizeof(WinogradTile)), 64);
  const int64_t words = positions * word_stride(block_tiles_) * 2;
  const int64_t sums = positions * block_tiles_ * unit_columns * 4;
  return pointers + pixels + where + words + sums;
}

int64_t Winograd::scratch(int32_t threads) const { return slot_bytes() * threads; }

WinogradTile Winograd::place(int64_t tile, const uint8_t* x, const uint8_t** pixels) const {
  const ConvShape& s = shape_;
  const int64_t image = tile / (tiles_h_ * tiles_w_), in_image = tile % (tiles_h_ * tiles_w_);
  const int64_t top = in_image / tiles_w_ * size, left = in_image % tiles_w_ * size;
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t iy = top - s.pad_top + i / patch, ix = left - s.pad_left + i % patch;
    const bool inside = iy >= 0 && iy < s.in_h && ix >= 0 && ix < s.in_w;
    pixels[i] = inside ? x + ((image * s.in_h + iy) * s.in_w + ix) * weights_->inputs : padding_.data();
  }
  return {(image * s.out_h + top) * s.out_w + left, static_cast<int32_t>(std::min(size, s.out_h - top)),
          static_cast<int32_t>(std::min(size, s.out_w - left))};
}

void Winograd::run_block(const Call& call, int64_t first, int64_t tiles, const Range& panels, int8_t* slot) const {
  const PackedWeights& w = *weights_;
  const ConvShape& s = shape_;
  auto** rows = reinterpret_cast<const uint8_t**>(slot);
  slot += rounded(block_tiles_ * 8, 64);
  auto** pixels = reinterpret_cast<const uint8_t**>(slot);
  slot += rounded(positions * 8, 64);
  auto* where = reinterpret_cast<WinogradTile*>(slot);
  slot += rounded(block_tiles_ * static_cast<int64_t>(sizeof(WinogradTile)), 64);
  auto* words = reinterpret_cast<int16_t*>(slot);
  auto* sums = reinterpret_cast<int32_t*>(slot + positions * word_stride(block_tiles_) * 2);

  const int64_t depth = rounded(w.inputs, unit_columns), stride = word_stride(tiles);
  for (int64_t t = 0; t < tiles; ++t) {
    where[t] = place(first + t, call.x, pixels);
    rows[t] = reinterpret_cast<const uint8_t*>(words + t * depth);
    w.kernels->winograd->input({pixels, w.inputs, flip_, zero_, words + t * depth, stride});
  }

  constexpr int32_t only_tap = 0;
  static const int32_t no_bias[unit_columns] = {};
  ByteEpilogue epilogue = epilogue_;
  GemmBlock g{};
  g.left = rows;
  g.rows = static_cast<int32_t>(tiles);
  g.taps = 1;
  g.depth = (w.depth + 1) / 2;
  g.right_taps = &only_tap;
  g.bias = no_bias;
  g.columns = unit_columns;
  const int64_t panel_sums = tiles * unit_columns, matrix_words = words_->panel_words / positions;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for (int64_t i = 0; i < positions; ++i) {
      g.left_offset = i * stride * 2;
      g.right = words_->data.data() + (p * positions + i) * matrix_words * 2;
      g.raw = sums + i * panel_sums;
      w.kernels->winograd->gemm(g);
    }
    const Panel& panel = w.panels[static_cast<size_t>(p)];
    epilogue.multiplier = multiplier_ + panel.padded;
    uint8_t* y = call.y + panel.first;
    w.kernels->winograd->output({sums, panel_sums, static_cast<int32_t>(tiles), where, s.out_w,
                                 bias_.data() + panel.padded, panel.columns, &epilogue, y, w.outputs,
                                 call.residual == nullptr ? nullptr : call.residual + panel.first});
    for (int64_t t = 0; t < tiles && table_ != nullptr; ++t) {
      for (int32_t i = 0; i < where[t].rows; ++i) {
        w.kernels->lookup(table_, y + (where[t].pixel + int64_t{i} * s.out_w) * w.outputs, where[t].columns,
                          panel.columns, w.outputs);
      }
    }
  }
}

void Winograd::run(const Threads& threads, const uint8_t* x, uint8_t* y, const uint8_t* residual, void* scratch) const {
  const Call call{x, y, residual};
  const int64_t tiles = shape_.batch * tiles_h_ * tiles_w_, panels = static_cast<int64_t>(weights_->panels.size());
  // few tiles are transformed by every part, each for some of the panels
  const int64_t parts = threads.count;
  const int64_t by_tiles = std::min(parts, std::max<int64_t>(tiles / 12, 1));
  const int64_t by_panels = std::min(std::max<int64_t>(parts / by_tiles, 1), panels);
  run_parts(threads, by_tiles * by_panels, [&](int64_t part) {
    const int64_t i = part / by_panels, j = part % by_panels;
    const int64_t begin = tiles * i / by_tiles, end = tiles * (i + 1) / by_tiles;
    const Range some{panels * j / by_panels, panels * (j + 1) / by_panels};
    auto* slot = static_cast<int8_t*>(scratch) + part * slot_bytes();
    const int64_t blocks = (end - begin + block_tiles_ - 1) / block_tiles_;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = begin + (end - begin) * b / blocks, last = begin + (end - begin) * (b + 1) / blocks;
      run_block(call, first, last - first, some, slot);
    }
  });
}

}  // namespace qat
