#include "wide.h"

#include <algorithm>

#include "parts.h"
#include "requantize.h"

namespace qat {
namespace {

// Codes as signed 16-bit integers, `wide_offset` less.
int16_t as_signed(uint16_t code) { return static_cast<int16_t>(code ^ 0x8000); }
int16_t as_signed(int16_t code) { return code; }
int16_t as_signed(uint8_t code) { return code; }
int16_t as_signed(int8_t code) { return code; }

int32_t wide_offset(Type x) { return x == Type::u16 ? 32768 : 0; }

// |a| <= 2^15 and |b| <= 2^8: 128 products stay inside 32 bits.
template <class X>
int64_t dot(const X* a, const int16_t* b, int32_t count) {
  int64_t total = 0;
  for (int32_t start = 0; start < count; start += 128) {
    const int32_t end = std::min(start + 128, count);
    int32_t sum = 0;
    for (int32_t i = start; i < end; ++i) sum += as_signed(a[i]) * b[i];
    total += sum;
  }
  return total;
}

int64_t position(int64_t o, int64_t k, int64_t stride, int64_t pad, int64_t dilation, int64_t size, bool transposed) {
  int64_t i = transposed ? o + pad - k * dilation : o * stride - pad + k * dilation;
  if (transposed) {
    if (i % stride != 0) return -1;
    i /= stride;
  }
  return i < size ? i : -1;
}

template <class X>
void pixel(const WideConv& conv, const X* image, int32_t oy, int32_t ox, int64_t at, void* y, const void* residual) {
  const PackedWeights& w = conv.weights;
  const ConvShape& s = conv.shape;
  const int32_t zero = conv.x_grid.zero_point - wide_offset(conv.x);
  constexpr int32_t chunk = 64;
  int64_t acc[chunk];
  for (int32_t first = 0; first < w.outputs; first += chunk) {
    const int32_t count = std::min(chunk, w.outputs - first);
    for (int32_t i = 0; i < count; ++i) {
      acc[i] = conv.epilogue.bias.empty() ? 0 : conv.epilogue.bias[static_cast<size_t>(first + i)];
    }
    for (int32_t t = 0; t < w.taps; ++t) {
      const int64_t iy =
          position(oy, t / w.kernel_w, s.stride_h, s.pad_top, s.dilation_h, s.in_h, s.transposed);
      const int64_t ix = position(ox, t % w.kernel_w, s.stride_w, s.pad_left, s.dilation_w, s.in_w, s.transposed);
      if (iy < 0 || ix < 0) continue;
      const X* row = image + (iy * s.in_w + ix) * w.inputs;
      for (int32_t i = 0; i < count; ++i) {
        const int32_t o = first + i;
        const int32_t group = o / (w.outputs / w.groups);
        const int16_t* weights = w.wide.data() + (int64_t{o} * w.taps + t) * w.depth;
        const int64_t sum = w.tap_sums[static_cast<size_t>(t) * static_cast<size_t>(w.outputs) + static_cast<size_t>(o)];
        acc[i] += dot(row + int64_t{group} * w.depth, weights, w.depth) - zero * sum;
      }
    }
    finish(conv.epilogue, acc, first, count, y, conv.y, at + first, residual);
  }
}

template <class X>
void run(const WideConv& conv, const Threads& threads, const X* x, void* y, const void* residual) {
  const ConvShape& s = conv.shape;
  const int64_t pixels = int64_t{s.out_h} * s.out_w, rows = s.batch * pixels;
  const int64_t image = int64_t{s.in_h} * s.in_w * conv.weights.inputs;
  run_parts(threads, threads.count, [&](int64_t part) {
    for (int64_t r = rows * part / threads.count; r < rows * (part + 1) / threads.count; ++r) {
      const int64_t p = r % pixels;
      pixel(conv, x + r / pixels * image, static_cast<int32_t>(p / s.out_w), static_cast<int32_t>(p % s.out_w),
            r * conv.weights.outputs, y, residual);
    }
  });
}

}  // namespace

void run_wide_conv(const WideConv& conv, const Threads& threads, const void* x, void* y, const void* residual) {
  switch (conv.x) {
    case Type::u8: return run(conv, threads, static_cast<const uint8_t*>(x), y, residual);
    case Type::s8: return run(conv, threads, static_cast<const int8_t*>(x), y, residual);
    case Type::u16: return run(conv, threads, static_cast<const uint16_t*>(x), y, residual);
    default: return run(conv, threads, static_cast<const int16_t*>(x), y, residual);
  }
}

}  // namespace qat
