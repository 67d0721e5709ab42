#include "pack.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace qat {
namespace {

// Weights less their zero points, (outputs, taps, inputs of a group), of 9 bits at most.
std::vector<int16_t> centred(const Weights& w) {
  const int64_t each = int64_t{w.kernel_h} * w.kernel_w * (w.inputs / w.groups);
  std::vector<int16_t> values(static_cast<size_t>(w.outputs * each));
  const auto* bytes = static_cast<const int8_t*>(w.data);
  for (int64_t i = 0; i < w.outputs * each; ++i) {
    int32_t code = bytes[w.type == Type::s4 ? i / 2 : i];
    if (w.type == Type::s4) code = static_cast<int8_t>(i % 2 == 0 ? code << 4 : code & 0xf0) >> 4;
    if (w.zero_points != nullptr) code -= w.zero_points[i / each];
    values[static_cast<size_t>(i)] = static_cast<int16_t>(code);
  }
  return values;
}

Method choose(const Weights& w, const std::vector<int16_t>& values, Type x, bool transposed) {
  const auto fits = [](int16_t v) { return v >= -128 && v <= 127; };
  if ((x != Type::u8 && x != Type::s8) || !std::all_of(values.begin(), values.end(), fits)) return Method::wide;
  if (!transposed && w.groups > 1 && w.groups == w.inputs && w.groups == w.outputs) return Method::depthwise;
  // with four channels and more, whole groups of four are read without waste
  if (!transposed && w.groups == 1 && w.inputs < 4 && w.kernel_w > 1) return Method::folded;
  return Method::gemm;
}

void pack_panels(PackedWeights& p, const std::vector<int16_t>& values) {
  const int32_t group = p.kernels->group();
  split_panels(p.groups, p.outputs / p.groups, p.kernels->units, p.taps, p.steps, group, p.panels);
  p.padded = static_cast<int32_t>(padded_columns(p.panels));
  const Panel& last = p.panels.back();
  p.data = AlignedBytes(static_cast<size_t>(last.offset + panel_bytes(last, p.taps, p.steps, group)));
  for (const Panel& panel : p.panels) {
    const int32_t width = panel.units * unit_columns;
    for (int32_t c = 0; c < panel.columns; ++c) {
      const int16_t* from = values.data() + int64_t{panel.first + c} * p.taps * p.depth;
      for (int32_t t = 0; t < p.taps; ++t) {
        int8_t* to = p.data.data() + panel.offset + (int64_t{t} * p.steps * width + c) * group;
        for (int32_t k = 0; k < p.depth; ++k) {
          to[int64_t{k / group} * width * group + k % group] = static_cast<int8_t>(from[int64_t{t} * p.depth + k]);
        }
      }
    }
  }
}

void pack_depthwise(PackedWeights& p, const std::vector<int16_t>& values) {
  const int32_t block = p.kernels->depthwise_block;
  const bool by_columns = p.kernel_h == 3 && p.kernel_w == 3;
  const int32_t taps4 = by_columns ? 12 : (p.taps + 3) / 4 * 4;
  for (int32_t i = 0; i < taps4; ++i) {
    p.order.push_back(by_columns ? (i % 4 == 3 ? -1 : i % 4 * 3 + i / 4) : i < p.taps ? i : -1);
  }
  p.padded = (p.outputs + block - 1) / block * block;
  p.data = AlignedBytes(static_cast<size_t>(p.padded) * static_cast<size_t>(taps4));
  for (int32_t i = 0; i < p.padded; ++i) {
    const int32_t channel = depthwise_channel(i, block);
    if (channel >= p.outputs) continue;
    int8_t* to = p.data.data() + int64_t{i / block} * block * taps4 + i % block * 4;
    for (int32_t t = 0; t < taps4; ++t) {
      const int32_t tap = p.order[static_cast<size_t>(t)];
      if (tap < 0) continue;
      to[int64_t{t / 4} * block * 4 + t % 4] = static_cast<int8_t>(values[static_cast<size_t>(channel * p.taps + tap)]);
    }
  }
}

}  // namespace

AlignedBytes::AlignedBytes(size_t size) {
  const size_t rounded = std::max<size_t>((size + 63) / 64 * 64, 64);
  data_.reset(static_cast<int8_t*>(std::aligned_alloc(64, rounded)));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_.get(), 0, rounded);
}

int64_t panel_bytes(const Panel& panel, int64_t taps, int64_t depth, int32_t group) {
  return taps * depth * panel.units * unit_columns * group;
}

int64_t padded_columns(const std::vector<Panel>& panels) {
  return panels.empty() ? 0 : panels.back().padded + int64_t{panels.back().units} * unit_columns;
}

void split_panels(int32_t groups, int32_t columns, int32_t max_units, int64_t taps, int64_t depth, int32_t group,
                  std::vector<Panel>& panels) {
  const int32_t all_units = (columns + unit_columns - 1) / unit_columns;
  const int32_t count = (all_units + max_units - 1) / max_units;
  int64_t offset = 0;
  int32_t padded = 0;
  for (int32_t g = 0; g < groups; ++g) {
    int32_t first = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t units = all_units / count + (i < all_units % count ? 1 : 0);
      const int32_t width = std::min(units * unit_columns, columns - first);
      panels.push_back({g, g * columns + first, width, units, padded, offset});
      offset += panel_bytes(panels.back(), taps, depth, group);
      padded += units * unit_columns;
      first += width;
    }
  }
}

std::shared_ptr<const PackedWeights> pack_weights(const char* isa, const Weights& weights, Type x, bool transposed) {
  auto packed = std::make_shared<PackedWeights>();
  PackedWeights& p = *packed;
  std::vector<int16_t> values = centred(weights);
  p.kernels = find_int8_kernels(isa, true);
  p.method = choose(weights, values, x, transposed);
  p.outputs = weights.outputs;
  p.inputs = weights.inputs;
  p.groups = weights.groups;
  p.kernel_h = weights.kernel_h;
  p.kernel_w = weights.kernel_w;
  p.taps = p.kernel_h * p.kernel_w;
  p.depth = p.inputs / p.groups;
  if (p.method == Method::folded) {
    p.taps = p.kernel_h;
    p.depth *= p.kernel_w;
  }
  p.steps = (p.depth + p.kernels->group() - 1) / p.kernels->group();
  p.padded = p.outputs;
  p.tap_sums.assign(static_cast<size_t>(p.taps) * static_cast<size_t>(p.outputs), 0);
  for (int32_t o = 0; o < p.outputs; ++o) {
    for (int32_t t = 0; t < p.taps; ++t) {
      const int16_t* from = values.data() + (int64_t{o} * p.taps + t) * p.depth;
      int32_t& sum = p.tap_sums[static_cast<size_t>(t) * static_cast<size_t>(p.outputs) + static_cast<size_t>(o)];
      for (int32_t k = 0; k < p.depth; ++k) sum += from[k];
    }
  }
  if (p.method == Method::wide) {
    p.wide = std::move(values);
  } else if (p.method == Method::depthwise) {
    pack_depthwise(p, values);
  } else {
    pack_panels(p, values);
  }
  return packed;
}

}  // namespace qat
