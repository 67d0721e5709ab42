// The integer operators beside convolutions and products.
#include "integer/elementwise.h"
#include "integer/layout.h"
#include "integer/normalize.h"
#include "integer/pool.h"
#include "integer/quantize.h"
#include "integer/resize.h"
#include "integer/table.h"
#include "kernel_cases.h"

namespace cases {
namespace {

using namespace qat;

Type any_type(Random& random) {
  if (random.once(4)) return random.once(2) ? Type::u16 : Type::s16;
  return byte_type(random);
}

Grid any_grid(Random& random, Type type) {
  return random_grid(random, type, random.real(1, 4000, width(type) == 1 ? 0x1p-15f : 0x1p-23f), false);
}

// The sizes come in braces, which are evaluated in order, and before the type that the function draws.
Tensor any_codes(Random& random, const std::vector<int64_t>& sizes, Type (*type_of)(Random&) = any_type) {
  const Type type = type_of(random);
  return random_codes(random, type, any_grid(random, type), sizes);
}

Tensor floats(Random& random, const std::vector<int64_t>& sizes) {
  Tensor t = empty(Type::f32, Grid{1.0f, 0, 0, 255, false}, sizes);
  for (int64_t i = 0; i < t.view.count(); ++i) {
    // ties between codes too, infinities and nan
    const uint32_t special[] = {0x7f800000, 0xff800000, 0x7fc00000};
    const float value = random.once(2) ? random.real(-4000, 4000, 0x1p-7f) : random.real(-300, 300, 0.5f);
    std::memcpy(t.memory.data() + 4 * i, random.once(40) ? static_cast<const void*>(&special[i % 3]) : &value, 4);
  }
  return t;
}

using Operator = void (*)(const char* isa, const Threads& threads, Random& random, Hash& hash);

void finish(Hash& hash, const Tensor& y) { hash.add(y.memory.data(), y.bytes()); }

std::vector<int64_t> image(Random& random) {
  return {random.in(1, 2), random.in(3, 8), random.in(3, 8), random.in(1, 70)};
}

void quantize_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = floats(random, {random.in(1, 5), random.in(1, 70)});
  const Type type = any_type(random);
  Tensor y = empty(type, any_grid(random, type), {x.view.sizes[0], x.view.sizes[1]});
  quantize(isa, threads, x.view, y.view, nullptr);
  finish(hash, y);
  Tensor back = empty(Type::f32, x.view.grid, {x.view.sizes[1], x.view.sizes[0]});
  const int64_t perm[] = {1, 0};
  dequantize(isa, threads, y.view, back.view, perm);
  finish(hash, back);
}

void requantize_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = any_codes(random, {random.in(1, 5), random.in(1, 300)});
  const Type type = any_type(random);
  Tensor y = empty(type, any_grid(random, type), {x.view.sizes[0], x.view.sizes[1]});
  requantize(isa, threads, x.view, y.view);
  finish(hash, y);
}

void elementwise_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const bool words = random.once(4);
  const auto type = words ? any_type : byte_type;
  const std::vector<int64_t> sizes{random.in(1, 4), random.in(1, 5), random.in(1, 70)};
  std::vector<int64_t> other = sizes;
  for (int64_t& size : other) {
    if (random.once(3)) size = 1;
  }
  const bool swapped = random.once(2);
  const Tensor a = any_codes(random, swapped ? other : sizes, type);
  const Tensor b = any_codes(random, swapped ? sizes : other, type);
  for (const auto function : {add, sub, mul, div}) {
    const Type y_type = type(random);
    Tensor y = empty(y_type, any_grid(random, y_type), sizes);
    function(isa, threads, a.view, b.view, y.view);
    finish(hash, y);
  }
}

void table_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = any_codes(random, {random.in(1, 5), random.in(1, 300)}, byte_type);
  std::vector<uint8_t> table(256);
  for (uint8_t& entry : table) entry = static_cast<uint8_t>(random.in(0, 255));
  Tensor y = empty(Type::u8, any_grid(random, Type::u8), {x.view.sizes[0], x.view.sizes[1]});
  apply_table(isa, threads, x.view, table.data(), y.view);
  finish(hash, y);
  const bool one = random.once(2);
  std::vector<float> slopes(one ? 1 : static_cast<size_t>(x.view.sizes[1]));
  for (float& slope : slopes) slope = random.real(-300, 300, 0x1p-8f);
  prelu(isa, threads, x.view, slopes.data(), static_cast<int64_t>(slopes.size()), 1, y.view);
  finish(hash, y);
}

void softmax_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Type x_type = any_type(random), y_type = width(x_type) == 1 ? byte_type(random) : any_type(random);
  const std::vector<int64_t> sizes{random.in(1, 12), random.in(1, 90), random.once(2) ? 1 : 3};
  const Tensor x = random_codes(random, x_type, any_grid(random, x_type), sizes);
  Grid grid = random_grid(random, y_type, width(y_type) == 1 ? 0x1p-8f : 0x1p-16f, false);
  if (random.once(2)) grid.zero_point = grid.qmin;
  Tensor y = empty(y_type, grid, sizes);
  const SoftmaxTable table = prepare_softmax(x.view.grid, grid, x.view.sizes[1]);
  softmax(isa, threads, x.view, 1, &table, y.view);
  hash.add(&table, sizeof table);
  finish(hash, y);
}

void layer_norm_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = any_codes(random, {random.in(1, 6), random.in(1, 300)});
  const Type y_type = any_type(random);
  Tensor y = empty(y_type, random_grid(random, y_type, random.real(1, 4000, 0x1p-14f), false),
                   {x.view.sizes[0], x.view.sizes[1]});
  std::vector<float> weight(300), bias(300);
  for (float& value : weight) value = random.real(-3000, 3000, 0x1p-11f);
  for (float& value : bias) value = random.real(-3000, 3000, 0x1p-11f);
  const float* factor = random.once(3) ? nullptr : weight.data();
  const float* summand = random.once(3) ? nullptr : bias.data();
  layer_norm(isa, threads, x.view, 1, factor, summand, 1e-5f, y.view);
  finish(hash, y);
}

void pool_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = any_codes(random, image(random));
  const int32_t kernel = random.small(1, 3), stride = random.small(1, 2), pad = random.small(0, kernel / 2);
  const PoolShape s{kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1, random.once(2)};
  const auto out = [&](int64_t size) { return (size + 2 * pad - kernel) / stride + 1; };
  const std::vector<int64_t> sizes{x.view.sizes[0], out(x.view.sizes[1]), out(x.view.sizes[2]), x.view.sizes[3]};
  Tensor most = empty(x.view.type, x.view.grid, sizes);
  max_pool(isa, threads, x.view, s, most.view);
  finish(hash, most);
  const Type y_type = any_type(random);
  Tensor average = empty(y_type, any_grid(random, y_type), sizes);
  avg_pool(isa, threads, x.view, s, average.view);
  finish(hash, average);
  Tensor pooled = empty(y_type, average.view.grid, {x.view.sizes[0], x.view.sizes[3]});
  const int64_t axes[] = {1, 2};
  mean(isa, threads, x.view, axes, 2, pooled.view);
  finish(hash, pooled);
}

void resize_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Tensor x = any_codes(random, image(random));
  const Type y_type = any_type(random);
  std::vector<int32_t> low[2], high[2];
  std::vector<float> weight[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t out = random.in(1, 12), last = x.view.sizes[1 + d] - 1;
    for (int64_t i = 0; i < out; ++i) {
      low[d].push_back(static_cast<int32_t>(random.in(0, last)));
      high[d].push_back(static_cast<int32_t>(low[d].back() < last ? low[d].back() + 1 : last));
      weight[d].push_back(low[d].back() < last ? random.real(0, 1000, 0.001f) : 0.5f);
    }
  }
  const auto sizes = [&] {
    return std::vector<int64_t>{x.view.sizes[0], static_cast<int64_t>(low[0].size()),
                                static_cast<int64_t>(low[1].size()), x.view.sizes[3]};
  };
  Tensor y = empty(y_type, any_grid(random, y_type), sizes());
  resize_nearest(isa, threads, x.view, low[0].data(), low[1].data(), y.view);
  finish(hash, y);
  const LinearTaps h{low[0].data(), high[0].data(), weight[0].data()};
  const LinearTaps w{low[1].data(), high[1].data(), weight[1].data()};
  resize_linear(isa, threads, x.view, h, w, y.view);
  finish(hash, y);
}

void layout_case(const char* isa, const Threads& threads, Random& random, Hash& hash) {
  const Type type = any_type(random);
  const std::vector<int64_t> sizes{random.in(2, 5), random.in(2, 5), random.in(2, 40)};
  const Tensor x = random_codes(random, type, any_grid(random, type), sizes);
  const int64_t *n = x.view.sizes, perm[] = {2, 0, 1}, pads[] = {1, 0, 0, 1, 1, 1}, shifts[] = {1, -1, 3};
  Tensor turned = empty(type, x.view.grid, {n[2], n[0], n[1]});
  transpose(isa, threads, x.view, perm, turned.view);
  finish(hash, turned);
  Tensor padded = empty(type, x.view.grid, {n[0] + 1, n[1] + 1, n[2] + 2});
  for (const PadMode mode : {PadMode::constant, PadMode::reflect, PadMode::replicate}) {
    pad(isa, threads, x.view, pads, mode, x.view.grid.zero_point, padded.view);
    finish(hash, padded);
  }
  Tensor rolled = empty(type, x.view.grid, {n[0], n[1], n[2]});
  roll(isa, threads, x.view, shifts, rolled.view);
  finish(hash, rolled);
  const Tensor other = any_codes(random, {n[0], n[1], random.in(1, 40)});
  Tensor joined = empty(type, x.view.grid, {n[0], n[1], n[2] + other.view.sizes[2]});
  const View both[] = {x.view, other.view};
  concat(isa, threads, both, 2, 2, joined.view);
  finish(hash, joined);
}

}  // namespace

void run_operators(const char* isa, int count) {
  const struct {
    const char* name;
    Operator run;
  } operators[] = {{"quantize", quantize_case},     {"requantize", requantize_case}, {"elementwise", elementwise_case},
                   {"table", table_case},           {"softmax", softmax_case},       {"layer_norm", layer_norm_case},
                   {"pool", pool_case},             {"resize", resize_case},         {"layout", layout_case}};
  uint64_t seed = 2000000;
  for (const auto& one : operators) {
    for (int i = 0; i < count; ++i) {
      Random random(seed++);
      Hash hash;
      const Threads threads = random_threads(random);
      one.run(isa, threads, random, hash);
      hash.print(one.name, i);
    }
  }
}

}  // namespace cases
