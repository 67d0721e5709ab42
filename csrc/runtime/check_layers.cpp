// Convolutions, products, windows and interpolation.
#include <algorithm>
#include <cmath>

#include "../kernels/integer/parallel.h"
#include "check.h"

namespace qat {
namespace {

// Input positions that the windows along a dimension span, with their padding.
constexpr int64_t max_extent = int64_t{1} << 28;
// Positions of a convolution times the taps of its kernel, for each of which 4 bytes are kept.
constexpr int64_t max_taps = int64_t{1} << 28;
constexpr int64_t max_phases = 4096;
constexpr int64_t max_channels = int64_t{1} << 24;

void images(const Checker& c) {
  c.require(c.x(0).rank == 4 && c.y.rank == 4, "x and y do not have four dimensions");
  c.require(c.x(0).sizes[0] == c.y.sizes[0], "x and y have different batch sizes");
}

void extent(const Checker& c, int64_t size, int64_t count, int64_t kernel, int64_t stride, int64_t dilation) {
  c.require(size <= max_extent && (count - 1) * stride + (kernel - 1) * dilation + 1 <= max_extent,
            "the windows extend too far");
}

bool is_finite(const Grid& a, const Grid& b, const Grid& y) {
  const float ratio_a = a.scale / y.scale, ratio_b = b.scale / y.scale;
  const float zeros = ratio_a * 65536.0f + ratio_b * 65536.0f;
  return std::isfinite(zeros);
}

// Own result, then a residual or a table.
void conv_result(const Checker& c) {
  const Grid own = conv_own_grid(c.op);
  const auto own_type = conv_own_type(c.op);
  View result{};
  result.type = own_type;
  result.grid = own;
  c.codes(result, "the own result");
  const bool residual = c.has(conv_residual), table = c.has(conv_table);
  c.require(!residual || !table, "has both a residual and a table");
  if (residual || table) {
    c.require(width_of(own_type) == 1 && width_of(c.y.type) == 1, "a residual or table with more than 8 bits");
  }
  if (residual) {
    const View& other = c.x(conv_residual);
    c.codes(other, "the residual");
    c.same_sizes(other);
    c.require(width_of(other.type) == 1, "a residual or table with more than 8 bits");
    c.require(is_finite(own, other.grid, c.y.grid), "the scales of the sum are too far apart");
  } else if (table) {
    c.constant(conv_table, c.y.type, int64_t{own.qmax} - own.qmin + 1, "table");
  } else {
    const Grid& y = c.y.grid;
    c.require(own_type == c.y.type && own.scale == y.scale && own.zero_point == y.zero_point && own.qmin == y.qmin &&
                  own.qmax == y.qmax,  // but it may be computed in float where the readers of y do not
              "the own result has another grid than y, with neither residual nor table");
  }
}

void conv_factors(const Checker& c, int64_t outputs) {
  c.scales(conv_scales, outputs);
  const auto* scales = static_cast<const float*>(c.x(conv_scales).data);
  const float x_scale = c.x(conv_x).grid.scale, own = c.op.floats[0];
  for (int64_t i = 0; i < outputs; ++i) {
    c.require(std::isfinite((x_scale * scales[i]) / own), "the scale of the weight is too large for that of y");
  }
  const bool fixed = c.plan.profile != Profile::onnx;
  c.require(c.has(conv_multipliers) == fixed && c.has(conv_shifts) == fixed,
            "multipliers and shifts are for the profile tflite, and needed there");
  if (!fixed) return;
  c.constant(conv_multipliers, Type::s32, outputs, "multipliers");
  c.constant(conv_shifts, Type::s32, outputs, "shifts");
  const auto* multipliers = static_cast<const int32_t*>(c.x(conv_multipliers).data);
  const auto* shifts = static_cast<const int32_t*>(c.x(conv_shifts).data);
  for (int64_t i = 0; i < outputs; ++i) {
    c.require(multipliers[i] == 0 || multipliers[i] >= 1 << 30, "a multiplier is neither 0 nor normalized");
    c.require(shifts[i] >= -31 && shifts[i] <= 30, "a shift is outside of [-31, 30]");
  }
}

}  // namespace

ConvShape conv_shape(const Operator& op, const View& x, const View& y) {
  const auto at = [&](size_t i) { return static_cast<int32_t>(op.ints[i]); };
  const auto size = [](const View& v, int32_t d) { return static_cast<int32_t>(v.sizes[d]); };
  return {x.sizes[0], size(x, 1), size(x, 2), size(y, 1), size(y, 2), at(0), at(1), at(2), at(3), at(4), at(5),
          at(7) != 0};
}

Type conv_own_type(const Operator& op) { return static_cast<Type>(op.ints[9]); }

Grid conv_own_grid(const Operator& op) {
  const auto at = [&](size_t i) { return static_cast<int32_t>(op.ints[i]); };
  return {op.floats[0], at(10), at(11), at(12), at(13) != 0};
}

PoolShape pool_shape(const Operator& op) {
  const auto at = [&](size_t i) { return static_cast<int32_t>(op.ints[i]); };
  PoolShape s{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), 1, 1, false};
  if (op.kind == Kind::max_pool) {
    s.dilation_h = at(8);
    s.dilation_w = at(9);
  } else {
    s.count_include_pad = at(8) != 0;
  }
  return s;
}

void check_conv(const Checker& c) {
  c.expect(9, 2, 14, 1);
  c.require(c.has(conv_scales), "the scales are absent");
  const View &x = c.x(conv_x), &w = c.x(conv_weight);
  c.codes(x, "x");
  c.codes(c.y, "y");
  images(c);
  c.require(c.plan.is_constant(c.op.inputs[conv_weight]) && w.rank == 4 && (w.type == Type::s8 || w.type == Type::s4),
            "the weight is not a constant of s8 or s4 with four dimensions");
  for (size_t i = 0; i < 2; ++i) c.integer(i, 1, max_window, "stride");
  for (size_t i = 2; i < 4; ++i) c.integer(i, 0, max_window, "padding");
  for (size_t i = 4; i < 6; ++i) c.integer(i, 1, max_window, "dilation");
  const int64_t groups = c.integer(6, 1, max_channels, "groups");
  const bool transposed = c.integer(7, 0, 1, "transposed") != 0;
  c.integer(8, 0, 1, "residual_first");
  c.integer(9, 1, 4, "own type");
  for (size_t i = 10; i < 13; ++i) c.integer(i, -32768, 65535, "own grid");
  c.integer(13, 0, 1, "own wide");
  const int64_t outputs = w.sizes[0];
  c.require(outputs <= max_channels && x.sizes[3] <= max_channels, "too many channels");
  c.require(outputs == c.y.sizes[3] && outputs % groups == 0 && x.sizes[3] % groups == 0 &&
                w.sizes[3] == x.sizes[3] / groups,
            "the channels of x, weight, groups and y do not fit");
  c.require(w.sizes[1] <= max_window && w.sizes[2] <= max_window, "the kernel is too large");
  const ConvShape s = conv_shape(c.op, x, c.y);
  extent(c, s.in_h, s.out_h, w.sizes[1], s.stride_h, s.dilation_h);
  extent(c, s.in_w, s.out_w, w.sizes[2], s.stride_w, s.dilation_w);
  const int64_t positions = checked_product(c, {s.out_h, s.out_w, w.sizes[1], w.sizes[2]});
  c.require(positions <= max_taps, "is too large");
  if (transposed) c.require(checked_product(c, {s.stride_h, s.stride_w}) <= max_phases, "the strides are too large");
  // rows that are copied with their padding are indexed with 32 bits, too
  if (x.sizes[3] < 4) {
    const int64_t window = s.dilation_w == 1 ? (int64_t{s.out_w} - 1) * s.stride_w + w.sizes[2] : s.out_w * w.sizes[2];
    c.require(checked_product(c, {x.sizes[0], s.in_h, window, x.sizes[3]}) <= max_bytes, "is too large");
  }
  if (c.has(conv_zero_points)) {
    c.constant(conv_zero_points, Type::s32, outputs, "weight zero points");
    const int32_t high = w.type == Type::s4 ? 7 : 127;
    const auto* zeros = static_cast<const int32_t*>(c.x(conv_zero_points).data);
    c.require(std::all_of(zeros, zeros + outputs, [&](int32_t z) { return z >= -high - 1 && z <= high; }),
              "a zero point of the weight is outside of its type");
  }
  if (c.has(conv_bias)) c.constant(conv_bias, Type::s32, outputs, "bias");
  conv_factors(c, outputs);
  conv_result(c);
}

void check_matmul(const Checker& c) {
  c.expect(2, 2, 1, 0);
  const View &a = c.x(0), &b = c.x(1), &y = c.y;
  c.codes(a, "a");
  c.codes(b, "b");
  c.codes(y, "y");
  c.require(c.plan.profile == Profile::onnx, "has no arithmetic of the profile tflite");
  const bool transposed = c.integer(0, 0, 1, "b_transposed") != 0;
  c.require(a.rank >= 2 && b.rank >= 2 && y.rank == std::max(a.rank, b.rank), "the ranks do not fit");
  const int64_t m = a.sizes[a.rank - 2], k = a.sizes[a.rank - 1];
  const int64_t n = b.sizes[b.rank - (transposed ? 2 : 1)];
  c.require(b.sizes[b.rank - (transposed ? 1 : 2)] == k, "a and b have different inner sizes");
  c.require(y.sizes[y.rank - 2] == m && y.sizes[y.rank - 1] == n, "y does not have the outer sizes of a and b");
  c.broadcasts(a, 2);
  c.broadcasts(b, 2);
  int64_t batch = 1;
  for (int32_t d = 0; d < y.rank - 2; ++d) {
    const auto size = [&](const View& v) { return d < y.rank - v.rank ? 1 : v.sizes[d - (y.rank - v.rank)]; };
    c.require(y.sizes[d] == std::max(size(a), size(b)), "y does not have the leading sizes of a and b");
    batch *= y.sizes[d];
  }
  // b is packed at run time, every product for itself
  const int64_t packed = checked_product(c, {k + 4, n + 64});
  checked_product(c, {batch, packed + 4 * n + 4 * m + 4096});
  c.require(std::isfinite(a.grid.scale * b.grid.scale / y.grid.scale), "the scales of a and b are too large for y's");
}

void check_window(const Checker& c) {
  const bool largest = c.op.kind == Kind::max_pool;
  c.expect(1, 1, largest ? 10 : 9, 0);
  const View& x = c.x(0);
  images(c);
  c.codes(x, "x");
  c.codes(c.y, "y");
  c.require(x.sizes[3] == c.y.sizes[3], "x and y have different channels");
  for (size_t i = 0; i < 4; ++i) c.integer(i, 1, max_window, i < 2 ? "kernel" : "stride");
  for (size_t i = 4; i < 8; ++i) c.integer(i, 0, max_window, "padding");
  if (largest) {
    c.same_codes(x);
    c.integer(8, 1, max_window, "dilation");
    c.integer(9, 1, max_window, "dilation");
  } else {
    c.integer(8, 0, 1, "count_include_pad");
  }
  const PoolShape s = pool_shape(c.op);
  const auto windows = [&](int64_t size, int64_t count, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    extent(c, size, count, kernel, stride, dilation);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = i * stride - pad;
      const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
      c.require(first < kernel && start + first * dilation < size, "a window has no element of x");
    }
  };
  windows(x.sizes[1], c.y.sizes[1], s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
  windows(x.sizes[2], c.y.sizes[2], s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
}

void check_resize(const Checker& c) {
  const bool nearest = c.op.kind == Kind::resize_nearest;
  c.expect(nearest ? 3 : 7, nearest ? 3 : 7, 0, 0);
  const View& x = c.x(0);
  images(c);
  c.codes(x, "x");
  c.codes(c.y, "y");
  c.require(x.sizes[3] == c.y.sizes[3], "x and y have different channels");
  for (int32_t d = 1; d <= 2; ++d) {
    const size_t first = nearest ? static_cast<size_t>(d) : static_cast<size_t>(3 * d - 2);
    c.indices(first, c.y.sizes[d], x.sizes[d], "indices");
    if (nearest) continue;
    c.indices(first + 1, c.y.sizes[d], x.sizes[d], "indices");
    c.constant(first + 2, Type::f32, c.y.sizes[d], "weights");
    const auto* weights = static_cast<const float*>(c.x(first + 2).data);
    c.require(std::all_of(weights, weights + c.y.sizes[d], [](float w) { return w >= 0.0f && w <= 1.0f; }),
              "a weight is outside of [0, 1]");
  }
}

}  // namespace qat
