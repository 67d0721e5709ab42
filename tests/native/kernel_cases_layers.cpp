// Convolutions and products of matrices.
#include "integer/conv.h"
#include "kernel_cases.h"

namespace cases {
namespace {

using namespace qat;

enum class Kind { dense, depthwise, transposed };

void convolution(const char* isa, Kind kind, const char* name, int number) {
  Random random(static_cast<uint64_t>(number) * 4 + static_cast<uint64_t>(kind));
  const bool depthwise = kind == Kind::depthwise, transposed = kind == Kind::transposed;
  Weights w{};
  w.groups = depthwise ? random.small(2, 70) : random.once(2) ? 1 : random.small(2, 3);
  w.inputs = w.groups * (depthwise ? 1 : random.small(1, random.once(4) ? 70 : 20));
  w.outputs = w.groups * (depthwise ? 1 : random.small(1, 50 / w.groups));
  const bool square = random.once(2);
  w.kernel_h = square ? random.small(0, 2) * 2 + 1 : random.small(1, 4);
  w.kernel_w = square ? w.kernel_h : random.small(1, 4);
  ConvShape s{};
  s.batch = random.in(1, 2);
  s.transposed = transposed;
  s.stride_h = random.small(1, 3);
  s.stride_w = square ? s.stride_h : random.small(1, 3);
  s.dilation_h = random.once(3) ? 2 : 1;
  s.dilation_w = random.once(3) ? 2 : 1;
  const int32_t extent_h = (w.kernel_h - 1) * s.dilation_h + 1, extent_w = (w.kernel_w - 1) * s.dilation_w + 1;
  s.pad_top = random.small(0, (extent_h - 1) / 2);
  s.pad_left = random.small(0, (extent_w - 1) / 2);
  s.in_h = random.small(transposed ? 1 : extent_h, extent_h + 6);
  s.in_w = random.small(transposed ? 1 : extent_w, extent_w + 9);
  if (transposed) {
    s.out_h = (s.in_h - 1) * s.stride_h + extent_h - 2 * s.pad_top;
    s.out_w = (s.in_w - 1) * s.stride_w + extent_w - 2 * s.pad_left;
  } else {
    s.out_h = (s.in_h + 2 * s.pad_top - extent_h) / s.stride_h + 1;
    s.out_w = (s.in_w + 2 * s.pad_left - extent_w) / s.stride_w + 1;
  }

  const bool words = random.once(8);
  const Type x_type = words ? (random.once(2) ? Type::u16 : Type::s16) : byte_type(random);
  const Type y_type = words && random.once(2) ? (random.once(2) ? Type::u16 : Type::s16) : byte_type(random);
  const Grid x_grid = random_grid(random, x_type, random.real(1, 4000, words ? 0x1p-24f : 0x1p-16f), false);
  const Tensor x = random_codes(random, x_type, x_grid, {s.batch, s.in_h, s.in_w, w.inputs});

  const int64_t each = int64_t{w.kernel_h} * w.kernel_w * (w.inputs / w.groups);
  w.type = random.once(5) ? Type::s4 : Type::s8;
  std::vector<int8_t> weights(static_cast<size_t>(w.outputs * each + 1));
  const bool ends = random.once(5);
  for (int8_t& code : weights) code = static_cast<int8_t>(ends ? (random.once(2) ? -128 : 127) : random.in(-128, 127));
  std::vector<int32_t> zero_points(static_cast<size_t>(w.outputs));
  for (int32_t& zero : zero_points) zero = random.small(-3, 3);
  w.data = weights.data();
  w.zero_points = random.once(6) ? zero_points.data() : nullptr;

  Epilogue e;
  e.wide = words || random.once(10);
  e.y = random_grid(random, y_type, random.real(1, 4000, 0x1p-12f), y_type == Type::u8 || y_type == Type::s8);
  const bool fixed = !e.wide && random.once(5);
  if (fixed) e.profile = random.once(2) ? Profile::tflite_double : Profile::tflite_single;
  for (int32_t o = 0; o < w.outputs; ++o) {
    const float scale = random.real(1, 2000, 0x1p-16f);
    e.multiplier.push_back(x_grid.scale * scale / e.y.scale);
    e.real.push_back(static_cast<double>(scale) * static_cast<double>(x_grid.scale));
    e.fixed.push_back(static_cast<int32_t>(random.in(1 << 30, INT32_MAX)));
    e.shift.push_back(random.small(-14, 1));
    if (number % 2 == 0) e.bias.push_back(random.small(-5000, 5000));
  }
  const bool bytes = y_type == Type::u8 || y_type == Type::s8;
  uint8_t table[256];
  for (uint8_t& entry : table) entry = static_cast<uint8_t>(random.in(0, 255));
  Tensor residual;
  if (bytes && random.once(3)) {
    e.table = table;
  } else if (bytes && random.once(2)) {
    e.add = true;
    e.residual_first = random.once(2);
    e.residual_type = byte_type(random);
    e.residual = random_grid(random, e.residual_type, random.real(1, 4000, 0x1p-12f), false);
    e.sum = random_grid(random, y_type, random.real(1, 4000, 0x1p-12f), true);
    residual = random_codes(random, e.residual_type, e.residual, {s.batch, s.out_h, s.out_w, w.outputs});
  }
  Tensor y = empty(y_type, e.y, {s.batch, s.out_h, s.out_w, w.outputs});

  const auto layer = prepare_conv(pack_weights(isa, w, x_type, transposed), s, x_type, x_grid, y_type, e);
  const Threads threads = random_threads(random);
  std::vector<uint8_t> scratch(static_cast<size_t>(conv_scratch(*layer, threads.count)) + 64);
  uint8_t* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  run_conv(*layer, threads, x.view.data, y.view.data, e.add ? residual.view.data : nullptr, aligned);
  Hash hash;
  hash.add(y.memory.data(), y.bytes());
  hash.print(name, number);
}

void product(const char* isa, int number) {
  Random random(static_cast<uint64_t>(number) + 1000000);
  MatmulShape s{};
  s.batch = random.in(1, 3);
  s.m = random.in(1, 40);
  s.n = random.in(1, 70);
  s.k = random.in(1, 90);
  s.b_transposed = random.once(2);
  const std::vector<int64_t> index{0, 1, 2};
  s.a_index = s.b_index = index.data();
  const bool words = random.once(8);
  const Type a_type = words ? Type::s16 : byte_type(random), b_type = byte_type(random), y_type = byte_type(random);
  const Grid a_grid = random_grid(random, a_type, random.real(1, 4000, words ? 0x1p-24f : 0x1p-16f), false);
  const Grid b_grid = random_grid(random, b_type, random.real(1, 4000, 0x1p-16f), false);
  const Grid y_grid = random_grid(random, y_type, random.real(1, 4000, 0x1p-13f), true);
  const Tensor a = random_codes(random, a_type, a_grid, {s.batch, s.m, s.k});
  const std::vector<int64_t> b_sizes{s.batch, s.b_transposed ? s.n : s.k, s.b_transposed ? s.k : s.n};
  const Tensor b = random_codes(random, b_type, b_grid, b_sizes);
  Tensor y = empty(y_type, y_grid, {s.batch, s.m, s.n});
  const Threads threads = random_threads(random);
  std::vector<uint8_t> scratch(static_cast<size_t>(matmul_scratch(isa, s, threads.count)) + 64);
  uint8_t* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  run_matmul(isa, threads, s, a.view, b.view, y.view, aligned);
  Hash hash;
  hash.add(y.memory.data(), y.bytes());
  hash.print("matmul", number);
}

}  // namespace

void run_layers(const char* isa, int count) {
  for (int i = 0; i < count; ++i) {
    convolution(isa, Kind::dense, "conv", i);
    convolution(isa, Kind::depthwise, "depthwise", i);
    convolution(isa, Kind::transposed, "transposed", i);
    product(isa, i);
  }
}

}  // namespace cases
