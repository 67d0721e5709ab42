// Seeded cases of the kernels, the same ones on every processor, and hashes of what they compute.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "integer/view.h"

namespace cases {

// splitmix64: the standard library's distributions differ from one to another.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Both ends included.
  int64_t in(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  int32_t small(int32_t low, int32_t high) { return static_cast<int32_t>(in(low, high)); }
  // Once in `times`.
  bool once(int64_t times) { return in(1, times) == 1; }
  // Exact in every arithmetic, times 2^power.
  float real(int64_t low, int64_t high, float power) { return static_cast<float>(in(low, high)) * power; }

 private:
  uint64_t state_;
};

class Hash {
 public:
  void add(const void* data, size_t bytes) {
    const auto* from = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < bytes; ++i) value_ = (value_ ^ from[i]) * 0x100000001b3u;
  }
  template <class T>
  void add(const std::vector<T>& values) {
    add(values.data(), values.size() * sizeof(T));
  }
  void print(const char* name, int number) const {
    std::printf("%s %d %016llx\n", name, number, static_cast<unsigned long long>(value_));
    std::fflush(stdout);
  }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

struct Tensor {
  qat::View view{};
  std::vector<uint8_t> memory;

  size_t bytes() const { return memory.size() - slack; }
  // behind an activation or a residual the kernels may read
  static constexpr size_t slack = 64;
};

inline size_t width(qat::Type type) {
  return type == qat::Type::f32 ? 4 : type == qat::Type::u16 || type == qat::Type::s16 ? 2 : 1;
}

inline qat::Grid random_grid(Random& random, qat::Type type, float scale, bool narrow) {
  const bool is_signed = type == qat::Type::s8 || type == qat::Type::s16;
  const int32_t levels = width(type) == 1 ? 256 : 65536;
  qat::Grid grid{scale, 0, is_signed ? -levels / 2 : 0, (is_signed ? levels / 2 : levels) - 1, levels > 256};
  if (narrow && random.once(2)) {
    grid.qmin = random.small(grid.qmin, grid.qmax - 1);
    grid.qmax = random.small(grid.qmin + 1, grid.qmax);
  }
  grid.zero_point = random.small(grid.qmin, grid.qmax);
  return grid;
}

inline Tensor empty(qat::Type type, const qat::Grid& grid, const std::vector<int64_t>& sizes) {
  Tensor t;
  t.view.type = type;
  t.view.grid = grid;
  t.view.rank = static_cast<int32_t>(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) t.view.sizes[d] = sizes[d];
  t.memory.assign(static_cast<size_t>(t.view.count()) * width(type) + Tensor::slack, 0);
  t.view.data = t.memory.data();
  return t;
}

// Codes of the grid, or only the two ends of it.
inline Tensor random_codes(Random& random, qat::Type type, const qat::Grid& grid, const std::vector<int64_t>& sizes) {
  Tensor t = empty(type, grid, sizes);
  const bool ends = random.once(5);
  for (int64_t i = 0; i < t.view.count(); ++i) {
    const int32_t code = !ends ? random.small(grid.qmin, grid.qmax) : random.once(2) ? grid.qmin : grid.qmax;
    std::memcpy(t.memory.data() + static_cast<size_t>(i) * width(type), &code, width(type));
  }
  return t;
}

inline qat::Type byte_type(Random& random) { return random.once(2) ? qat::Type::u8 : qat::Type::s8; }

// One part after another, the last one first, each as small as it may be.
inline void run_backwards(void*, int64_t begin, int64_t end, int64_t grain, qat::Task task, void* context) {
  while (begin < end) {
    const int64_t start = end - begin > grain ? end - grain : begin;
    task(start, end, context);
    end = start;
  }
}

inline qat::Threads random_threads(Random& random) {
  if (random.once(2)) return {qat::run_serially, nullptr, 1};
  return {run_backwards, nullptr, 3};
}

void run_layers(const char* isa, int count);
void run_operators(const char* isa, int count);
void run_training(const char* isa, int count);

}  // namespace cases
