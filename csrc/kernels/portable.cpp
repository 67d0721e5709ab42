// For every processor: the vectors of gcc and clang, which become whatever the architecture's baseline has.
//
// They have 16 bytes, because gcc takes wider ones apart into single elements where the processor has none.
#include "training_loops.h"

namespace qat {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));

inline Ints pattern(Floats a) { return reinterpret_cast<Ints>(a); }
inline Floats number(Ints a) { return reinterpret_cast<Floats>(a); }
inline Floats pick(Ints mask, Floats a, Floats b) { return number((pattern(a) & mask) | (pattern(b) & ~mask)); }
inline int32_t sum(Ints a) { return (a[0] + a[2]) + (a[1] + a[3]); }

// Half to even: from 2^23 on, float32 has no fraction left, and below the sum is rounded to a whole number.
inline Floats round_half_even(Floats a) {
  const Floats limit = Floats{} + 8388608.0f;
  const Ints sign = Ints{} + INT32_MIN;
  const Floats magnitude = number(pattern(a) & ~sign);
  const Floats whole = (magnitude + limit) - limit;
  return pick(magnitude < limit, number(pattern(whole) | (pattern(a) & sign)), a);
}

inline Ints to_bfloat16(Floats a) {
  const Words bits = reinterpret_cast<Words>(a);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Ints is_number = a == a;
  return (reinterpret_cast<Ints>(rounded) & is_number) | ((Ints{} + 0x7fc0) & ~is_number);
}

struct Vector {
  static constexpr int width = 8;  // a byte of the mask
  struct Float {
    Floats a, b;
  };
  struct Mask {
    Ints a, b;  // all ones or zeros
  };

  static Float set(float a) { return {Floats{} + a, Floats{} + a}; }
  static Float load(const float* from) {
    Float out;
    std::memcpy(&out, from, sizeof(out));
    return out;
  }
  static Float load(const uint16_t* from) {
    Words a, b;
    for (int i = 0; i < 4; ++i) a[i] = from[i], b[i] = from[i + 4];
    return {reinterpret_cast<Floats>(a << 16), reinterpret_cast<Floats>(b << 16)};
  }
  static void store(float* to, Float v) { std::memcpy(to, &v, sizeof(v)); }
  static void store(uint16_t* to, Float v) {
    const Ints a = to_bfloat16(v.a), b = to_bfloat16(v.b);
    for (int i = 0; i < 4; ++i) to[i] = static_cast<uint16_t>(a[i]), to[i + 4] = static_cast<uint16_t>(b[i]);
  }
  static Float div(Float x, Float y) { return {x.a / y.a, x.b / y.b}; }
  static Float add(Float x, Float y) { return {x.a + y.a, x.b + y.b}; }
  static Float sub(Float x, Float y) { return {x.a - y.a, x.b - y.b}; }
  static Float mul(Float x, Float y) { return {x.a * y.a, x.b * y.b}; }
  static Float min(Float x, Float y) { return {pick(x.a < y.a, x.a, y.a), pick(x.b < y.b, x.b, y.b)}; }
  static Float max(Float x, Float y) { return {pick(x.a > y.a, x.a, y.a), pick(x.b > y.b, x.b, y.b)}; }
  static Float round(Float x) { return {round_half_even(x.a), round_half_even(x.b)}; }
  static Mask ordered(Float x) { return {x.a == x.a, x.b == x.b}; }
  static Mask finite(Float x) {
    return {(pattern(x.a) & 0x7f800000) != 0x7f800000, (pattern(x.b) & 0x7f800000) != 0x7f800000};
  }
  static Mask equal(Float x, Float y) { return {x.a == y.a, x.b == y.b}; }
  static Mask both(Mask x, Mask y) { return {x.a & y.a, x.b & y.b}; }
  static Float keep(Mask mask, Float x) { return {number(pattern(x.a) & mask.a), number(pattern(x.b) & mask.b)}; }
  static Float select(Mask mask, Float x, Float y) { return {pick(mask.a, x.a, y.a), pick(mask.b, x.b, y.b)}; }
  static uint32_t bits(Mask mask) {
    return static_cast<uint32_t>(sum((mask.a & Ints{1, 2, 4, 8}) | (mask.b & Ints{16, 32, 64, 128})));
  }
  static int count(Mask mask) { return -sum(mask.a + mask.b); }
  // Bins of the lanes that are not +0.0, side by side; writes all of a vector, and returns how many of it count.
  static int pack_bins(Float v, int shift, uint32_t* to) {
    uint32_t patterns[width];
    std::memcpy(patterns, &v, sizeof(patterns));
    int count = 0;
    for (int k = 0; k < width; ++k) {
      to[count] = patterns[k] >> shift;
      count += patterns[k] != 0;
    }
    return count;
  }
  static void store_masked(float* to, const float* from, uint32_t bits) {
    const Ints low{1, 2, 4, 8}, high{16, 32, 64, 128}, given = Ints{} + static_cast<int32_t>(bits);
    store(to, keep({(given & low) == low, (given & high) == high}, load(from)));
  }
  static void store_masked(uint16_t* to, const uint16_t* from, uint32_t bits) {
    const Halves one_each{1, 2, 4, 8, 16, 32, 64, 128};
    const Halves given = Halves{} + static_cast<uint16_t>(bits);
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    halves &= reinterpret_cast<Halves>((given & one_each) == one_each);
    std::memcpy(to, &halves, sizeof(halves));
  }
};

constexpr Kernels kernels = all_kernels<Vector>("portable");

}  // namespace

const Kernels* portable_kernels() { return &kernels; }

}  // namespace qat
