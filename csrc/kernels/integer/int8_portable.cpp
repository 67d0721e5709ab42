// Any processor: the vectors are arrays, and what the compiler makes of them.
#include <cmath>

#include "depthwise_loops.h"
#include "isa.h"
#include "tile_loops.h"

namespace qat {
namespace {

struct Vector {
  static constexpr int width = 4;
  static constexpr int group = 4;
  template <int Units>
  static constexpr int rows = 2;

  struct Int {
    int32_t lane[width];
  };
  struct Float {
    float lane[width];
  };
  struct Left {
    uint8_t byte[4 * width];
  };
  using Flip = uint8_t;
  using Right = const int8_t*;
  using Bytes = ByteCodes;

  template <class To, class F>
  static To each(F f) {
    To to;
    for (int i = 0; i < width; ++i) to.lane[i] = f(i);
    return to;
  }

  static Int load(const int32_t* from) {
    return each<Int>([=](int i) { return from[i]; });
  }
  static void store(int32_t* to, Int a) {
    for (int i = 0; i < width; ++i) to[i] = a.lane[i];
  }
  static Int set(int32_t a) {
    return each<Int>([=](int) { return a; });
  }
  // as the vector instructions, sums wrap around
  static int32_t wrapping(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static Int add(Int a, Int b) {
    return each<Int>([&](int i) { return wrapping(a.lane[i], b.lane[i]); });
  }

  static Float load(const float* from) {
    return each<Float>([=](int i) { return from[i]; });
  }
  static Float set(float a) {
    return each<Float>([=](int) { return a; });
  }
  static Float to_float(Int a) {
    return each<Float>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static Int to_int(Float a) {
    return each<Int>([&](int i) {
      const float rounded = std::nearbyint(a.lane[i]);
      return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
    });
  }
  static Float mul(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float min(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Float max(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Float add(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float round(Float a) {
    return each<Float>([&](int i) { return std::nearbyint(a.lane[i]); });
  }
  static Float fma(Float a, Float b, Float c) {
    return each<Float>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }

  static Flip flip(uint8_t byte) { return byte; }
  static Left left(const uint8_t* four, Flip flip) {
    Left a;
    for (int i = 0; i < 4 * width; ++i) a.byte[i] = four[i % 4] ^ flip;
    return a;
  }
  static Right right(const int8_t* from) { return from; }
  static Int dot(Int acc, Left a, Right b) {
    for (int i = 0; i < width; ++i) {
      int32_t sum = 0;
      for (int j = 4 * i; j < 4 * i + 4; ++j) sum += a.byte[j] * b[j];
      acc.lane[i] = wrapping(acc.lane[i], sum);
    }
    return acc;
  }

  template <int Rows>
  static void interleave(const uint8_t* const* from, int64_t offset, Flip flip, Left to[4]) {
    for (int q = 0; q < 4; ++q) {
      for (int i = 0; i < 4 * width; ++i) to[q].byte[i] = from[i % 4 < Rows ? i % 4 : 0][offset + q * 4 + i / 4] ^ flip;
    }
  }

  static Int codes(const uint8_t* from, bool is_signed) {
    return each<Int>([=](int i) { return is_signed ? static_cast<int8_t>(from[i]) : from[i]; });
  }

  static uint8_t byte(int32_t code, const Bytes& c) {
    // nearer to zero first, as the sum with the zero point must not wrap around
    const int32_t near = code < -32768 ? -32768 : code > 32767 ? 32767 : code;
    const int32_t sum = near + c.zero;
    return static_cast<uint8_t>((sum < c.low ? c.low : sum > c.high ? c.high : sum) ^ c.flip);
  }
  template <int Units>
  static void store_columns(uint8_t* to, const Int* c, const Bytes& bytes, int32_t columns) {
    for (int32_t i = 0; i < columns; ++i) to[i] = byte(c[i / width].lane[i % width], bytes);
  }
  static void store_interleaved(uint8_t* to, const Int c[4], const Bytes& bytes, int32_t channels) {
    store_columns<1>(to, c, bytes, channels);
  }
};

void gemm(const GemmBlock& block, int32_t) { gemm_units<Vector, 1>(block); }

void depthwise(const DepthwiseBlock& block) { depthwise_rows<Vector>(block); }

void depthwise_line(const DepthwiseLine& line) { depthwise_lines<Vector>(line); }

void lookup(const uint8_t* table, uint8_t* y, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) y[r * stride + c] = table[y[r * stride + c]];
  }
}

int64_t peak(int64_t steps) {
  Vector::Int acc = Vector::set(0);
  const uint8_t ones[4] = {1, 1, 1, 1};
  const int8_t weights[4 * Vector::width] = {1};
  const Vector::Left a = Vector::left(ones, 0);
  for (int64_t s = 0; s < steps; ++s) {
    acc = Vector::dot(acc, a, weights);
    __asm__ volatile("" : "+m"(acc));
  }
  return steps * 4 * Vector::width;
}

const Int8Kernels table{
    "portable",     false,  1,    {Vector::rows<1>, 0, 0, 0}, 4 * Vector::width, gemm, depthwise,
    depthwise_line, lookup, peak, nullptr,
};

}  // namespace

const Int8Kernels* int8_portable() { return &table; }

}  // namespace qat
