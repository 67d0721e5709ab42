// The kernels of training, on runs of any length.
#include "kernel_cases.h"
#include "kernels.h"

namespace cases {
namespace {

using namespace qat;

float value(Random& random, float) {
  const uint32_t special[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x80000000, 0};
  if (random.once(30)) {
    float v;
    std::memcpy(&v, &special[random.in(0, 4)], sizeof v);
    return v;
  }
  return random.once(2) ? random.real(-70000, 70000, 0x1p-12f) : random.real(-300, 300, 0.125f);
}

uint16_t value(Random& random, uint16_t) { return static_cast<uint16_t>(random.in(0, 65535)); }

template <class T>
std::vector<T> values(Random& random, size_t n) {
  std::vector<T> made(n);
  for (T& v : made) v = value(random, T{});
  return made;
}

template <class T>
void run_case(const TypedKernels<T>& kernels, const char* name, int number) {
  Random random(static_cast<uint64_t>(number) * 2 + sizeof(T) + 3000000);
  const auto n = static_cast<size_t>(random.in(1, 70));
  const auto count = static_cast<int64_t>(n);
  const std::vector<T> x = values<T>(random, n), grad = values<T>(random, n);
  const float scale = random.real(1, 4000, 0x1p-10f), zero = random.real(0, 255, 1.0f);
  const Range range{0.0f, random.once(4) ? zero : 255.0f};
  std::vector<float> scales(n), zeros(n), ds(n), dz(n), real(n), low(n, 1.0f), high(n, -1.0f);
  for (size_t i = 0; i < n; ++i) {
    scales[i] = random.real(1, 4000, 0x1p-10f);
    zeros[i] = random.real(0, 255, 1.0f);
  }
  std::vector<T> y(n), dx(n);
  std::vector<uint8_t> bits((n + 7) / 8);
  Hash hash;
  kernels.quantize_run(x.data(), y.data(), bits.data(), count, scale, zero, range);
  hash.add(y), hash.add(bits);
  kernels.quantize_each(x.data(), y.data(), bits.data(), count, scales.data(), zeros.data(), range);
  hash.add(y), hash.add(bits);
  kernels.mask_run(grad.data(), bits.data(), dx.data(), count);
  hash.add(dx);
  Extrema extrema{3e38f, -3e38f, 0};
  kernels.extrema_run(x.data(), count, &extrema);
  // an extremum of zero may have either sign
  extrema.low += 0.0f, extrema.high += 0.0f;
  hash.add(&extrema, sizeof extrema);
  int64_t nonfinite = 0;
  kernels.extrema_each(x.data(), count, low.data(), high.data(), &nonfinite);
  for (size_t i = 0; i < n; ++i) low[i] += 0.0f, high[i] += 0.0f;
  hash.add(low), hash.add(high), hash.add(&nonfinite, sizeof nonfinite);
  std::vector<uint32_t> bins(n + 16);
  bins.resize(static_cast<size_t>(kernels.bins_run(x.data(), count, 16, bins.data(), &extrema)));
  hash.add(bins);
  // whether a nan that an operation makes has a sign depends on the processor
  const auto add_numbers = [&](std::vector<float>& numbers) {
    for (float& v : numbers) v = v == v ? v : 0.0f;
    hash.add(numbers);
  };
  kernels.multiply_each(x.data(), scales.data(), real.data(), count);
  add_numbers(real);
  kernels.divide_each(real.data(), scales.data(), y.data(), count);
  hash.add(y);
  kernels.weight_run(x.data(), y.data(), bits.data(), count, scales[0], scale, zero, range);
  hash.add(y), hash.add(bits);
  for (const bool clips : {false, true}) {
    kernels.learned_run(grad.data(), x.data(), dx.data(), ds.data(), dz.data(), count, scale, zero, range, clips);
    hash.add(dx), add_numbers(ds), add_numbers(dz);
    kernels.learned_each(grad.data(), x.data(), dx.data(), ds.data(), dz.data(), count, scales.data(), zeros.data(),
                         range, clips);
    hash.add(dx), add_numbers(ds), add_numbers(dz);
  }
  kernels.weight_learned_run(grad.data(), x.data(), dx.data(), ds.data(), dz.data(), count, scales[0], scale, zero,
                             range);
  hash.add(dx), add_numbers(ds), add_numbers(dz);
  hash.print(name, number);
}

void run_sums(const Kernels& kernels, int number) {
  Random random(static_cast<uint64_t>(number) + 4000000);
  const auto n = static_cast<size_t>(random.in(1, 70));
  const auto count = static_cast<int64_t>(n);
  std::vector<float> x(n);
  std::vector<double> sums(n, 0.25), points(n), jumps(n);
  for (size_t i = 0; i < n; ++i) {
    x[i] = random.real(-70000, 70000, 0.001f);
    points[i] = static_cast<double>(random.real(-70000, 70000, 0.0001f));
    jumps[i] = static_cast<double>(random.real(-70000, 70000, 0.0001f));
  }
  Hash hash;
  const double sum = kernels.sum_run(x.data(), count);
  kernels.sum_each(x.data(), count, sums.data());
  const double error = kernels.clip_error(points.data(), jumps.data(), count, 0.037, -100.0, 155.0);
  hash.add(&sum, sizeof sum), hash.add(sums), hash.add(&error, sizeof error);
  hash.print("sums", number);
}

void run_norm(const NormKernels& kernels, int number) {
  Random random(static_cast<uint64_t>(number) + 5000000);
  const auto rows = static_cast<int64_t>(random.in(1, 5)), channels = static_cast<int64_t>(random.in(1, 40));
  const int64_t count = rows * channels;
  const auto n = static_cast<size_t>(count), c = static_cast<size_t>(channels);
  std::vector<float> x(n), y(n), dx(n), factor(n), shift(n), low(c, 1.0f), high(c, -1.0f);
  for (size_t i = 0; i < n; ++i) {
    x[i] = random.real(-70000, 70000, 0.001f);
    y[i] = random.real(-70000, 70000, 0.001f);
    factor[i] = random.real(-300, 300, 0.01f);
    shift[i] = random.real(-300, 300, 0.1f);
  }
  std::vector<double> sums(c), squares(c);
  std::vector<uint8_t> bits((n + 7) / 8);
  Hash hash;
  kernels.moments_rows(x.data(), rows, channels, sums.data(), squares.data(), low.data(), high.data());
  hash.add(sums), hash.add(squares), hash.add(low), hash.add(high);
  kernels.moments_run(x.data(), count, sums.data(), squares.data(), low.data(), high.data());
  kernels.products_rows(x.data(), y.data(), rows, channels, sums.data(), squares.data());
  kernels.products_run(x.data(), y.data(), count, sums.data(), squares.data());
  hash.add(sums), hash.add(squares), hash.add(low), hash.add(high);
  kernels.gradient_run(x.data(), y.data(), dx.data(), count, 1.5f, -0.3f, 0.7f, 0.01f);
  hash.add(dx);
  kernels.gradient_each(x.data(), y.data(), dx.data(), count, factor.data(), shift.data(), factor.data(), shift.data());
  hash.add(dx);
  kernels.add_run(x.data(), y.data(), dx.data(), count);
  hash.add(dx);
  for (const bool quantize : {false, true}) {
    const NormSteps steps{0.0f, 6.0f, quantize, 0.05f, 3.0f, {0.0f, 100.0f}};
    kernels.norm_run(x.data(), y.data(), bits.data(), count, 0.7f, 0.3f, steps);
    hash.add(y), hash.add(bits);
    kernels.norm_each(x.data(), y.data(), bits.data(), count, factor.data(), shift.data(), steps);
    hash.add(y), hash.add(bits);
  }
  std::vector<float> ds(n), dz(n);
  for (const bool clips : {false, true}) {
    const NormSteps steps{0.0f, 6.0f, true, 0.05f, 3.0f, {0.0f, 100.0f}, clips};
    kernels.norm_run(x.data(), dx.data(), bits.data(), count, 0.7f, 0.3f, steps);
    hash.add(bits);
    kernels.learned_run(y.data(), x.data(), dx.data(), ds.data(), dz.data(), count, 0.7f, 0.3f, steps);
    hash.add(dx), hash.add(ds), hash.add(dz);
    kernels.learned_each(y.data(), x.data(), dx.data(), ds.data(), nullptr, count, factor.data(), shift.data(), steps);
    hash.add(dx), hash.add(ds);
  }
  hash.print("norm", number);
}

void run_elements(const Kernels& kernels, int number) {
  Random random(static_cast<uint64_t>(number) + 6000000);
  const auto n = static_cast<size_t>(random.in(1, 70));
  const auto count = static_cast<int64_t>(n);
  std::vector<float> x(n), grad(n), y(n), numbers(n);
  std::vector<uint8_t> bits((n + 7) / 8), kept_bits(bits.size(), 0xa5);
  for (size_t i = 0; i < n; ++i) {
    x[i] = random.real(-70000, 70000, 0.0002f);
    grad[i] = random.real(-70000, 70000, 0.001f);
  }
  Hash hash;
  const int64_t first = (int64_t{number} << 30) + number;
  kernels.drop.place_numbers(drop_key(number * 0x123456789abcdefLL, first), first, numbers.data(), count);
  hash.add(numbers);
  kernels.tanh.run(x.data(), y.data(), count, 1.7f);
  hash.add(y);
  kernels.tanh.gradient_run(grad.data(), x.data(), y.data(), count, 1.7f);
  hash.add(y);
  kernels.drop.keep_run(numbers.data(), 0x1p23f, x.data(), kept_bits.data(), y.data(), bits.data(), count);
  hash.add(y), hash.add(bits);
  kernels.drop.keep_run(numbers.data(), 0x1p22f, grad.data(), nullptr, y.data(), nullptr, count);
  hash.add(y);
  hash.print("elements", number);
}

void run_oscillation(const Kernels& kernels, int number) {
  Random random(static_cast<uint64_t>(number) + 7000000);
  const auto n = static_cast<size_t>(random.in(1, 600));
  const auto count = static_cast<int64_t>(n);
  std::vector<float> weight(n), average(n), frequency(n), held(n);
  std::vector<int16_t> codes(n);
  std::vector<int8_t> direction(n);
  // vector<bool> has no elements in memory
  std::vector<uint8_t> frozen(n);
  for (size_t i = 0; i < n; ++i) {
    weight[i] = random.real(-70000, 70000, 0.0002f);
    average[i] = random.real(-8000, 7000, 0.001f);
    frequency[i] = random.real(0, 1000, 0.001f);
    held[i] = random.real(-8, 7, 1.0f);
    codes[i] = static_cast<int16_t>(random.in(0, 15) - 8);
    direction[i] = static_cast<int8_t>(random.in(0, 2) - 1);
    frozen[i] = random.once(5);
  }
  const OscillationState state{codes.data(),     direction.data(),
                               average.data(),   frequency.data(),
                               reinterpret_cast<bool*>(frozen.data()), held.data()};
  Hash hash;
  for (const int options : {0, 1, 2, 3, 4, 5, 6, 7}) {
    const OscillationRule rule{0.1f, (options & 1) != 0, 0.4f, (options & 2) != 0, (options & 4) != 0};
    kernels.oscillation.run(weight.data(), state, count, 0.7f, 1.3f, 2.0f, {-8.0f, 7.0f}, rule);
    // a zero may have either sign
    for (size_t i = 0; i < n; ++i) held[i] += 0.0f, average[i] += 0.0f;
    for (float& w : weight) w = w * 0.9f + 0.3f;
    hash.add(weight), hash.add(average), hash.add(frequency), hash.add(held), hash.add(codes), hash.add(direction);
    hash.add(frozen);
  }
  hash.print("oscillation", number);
}

}  // namespace

void run_training(const char* isa, int count) {
  const Kernels& kernels = *find_kernels(isa);
  for (int i = 0; i < count; ++i) {
    run_case(kernels.f32, "training_f32", i);
    run_case(kernels.bf16, "training_bf16", i);
    run_sums(kernels, i);
    run_norm(kernels.norm, i);
    run_elements(kernels, i);
    run_oscillation(kernels, i);
  }
}

}  // namespace cases
