// Feeds changed plans to the runner: no file may crash it. Build with sanitizers; scripts/fuzz_plan does.
//
// Usage: fuzz_plan COUNT SEED FILE...   (FILEs are valid plans)
// Each input is a file with some of its fields changed (found by reading its records), some bytes flipped, or its end
// cut; most get the right size and checksum, so that what follows is tested, too. What loads is run, with inputs and
// outputs in memory of exactly their size, and must not allocate while it runs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/runtime/qat_runtime.h"
#include "../../csrc/runtime/reader.h"

// Of the address sanitizer, whose header not every compiler brings.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void*, size_t),
                                                         void (*released)(const volatile void*));

namespace {

using Bytes = std::vector<uint8_t>;

struct Field {
  size_t at, size;
};

// Of a valid plan.
class Fields {
 public:
  explicit Fields(const Bytes& plan) : reader_(plan.data(), 0, plan.size()) {
    skip(8);
    add(4);
    skip(4);
    add(8);
    add(8);
    uint64_t counts[6];
    for (auto& count : counts) count = add(4);
    add(8);
    for (uint64_t i = 0; i < counts[1]; ++i) array();
    for (uint64_t i = 0; i < counts[2]; ++i) {
      array();
      add(8);
      add(8);
    }
    for (uint64_t i = 0; i < counts[3]; ++i) {
      add(2);
      skip(add(4));
      list(4);
      add(4);
      // the count comes first, so the order is: inputs, output, integers, floats
      list(8);
      list(4);
    }
    for (uint64_t i = 0; i < counts[4] + counts[5]; ++i) add(4);
  }

  const std::vector<Field>& all() const { return fields_; }

 private:
  uint64_t add(size_t size) {
    fields_.push_back({static_cast<size_t>(reader_.at()), size});
    return size == 1 ? reader_.u8() : size == 2 ? reader_.u16() : size == 4 ? reader_.u32() : reader_.u64();
  }
  void skip(uint64_t size) {
    while (size-- > 0) reader_.u8();
  }
  void list(size_t size) {
    for (uint64_t n = add(2); n > 0; --n) add(size);
  }
  void array() {
    skip(add(4));
    add(1);
    for (uint64_t rank = add(1); rank > 0; --rank) add(8);
    for (int i = 0; i < 4; ++i) add(4);
    add(1);
  }

  qat::Reader reader_;
  std::vector<Field> fields_;
};

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  uint64_t below(uint64_t limit) { return random_() % limit; }

  Bytes change(const Bytes& seed, const std::vector<Field>& fields) {
    Bytes plan = seed;
    const uint64_t changes = 1 + below(below(4) == 0 ? 8 : 2);
    for (uint64_t i = 0; i < changes; ++i) change_once(plan, fields);
    if (below(20) == 0) plan.resize(below(plan.size()));
    if (plan.size() >= 24 && below(10) != 0) {
      write(plan, {16, 8}, plan.size());
      write(plan, {12, 4}, qat::crc32(plan.data() + 16, plan.size() - 16));
    }
    return plan;
  }

 private:
  static uint64_t read(const Bytes& plan, Field f) {
    uint64_t value = 0;
    for (size_t i = 0; i < f.size; ++i) value |= uint64_t{plan[f.at + i]} << 8 * i;
    return value;
  }

  static void write(Bytes& plan, Field f, uint64_t value) {
    for (size_t i = 0; i < f.size; ++i) plan[f.at + i] = static_cast<uint8_t>(value >> 8 * i);
  }

  uint64_t value(const Bytes& plan, const std::vector<Field>& fields, Field f) {
    constexpr uint64_t special[] = {0,          1,          2,          3,          7,          8,         64,
                                    127,        128,        255,        256,        32767,      32768,     65535,
                                    65536,      0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 1u << 20, 1u << 28,
                                    uint64_t{1} << 40,      uint64_t{1} << 62,      uint64_t{1} << 63,     0x7fc00000,
                                    0x7f800000, 0x3f800000};
    const uint64_t old = read(plan, f);
    switch (below(6)) {
      case 0: return special[below(std::size(special))];
      case 1: return ~special[below(std::size(special))] + 1;
      case 2: return old + 1 - below(3);
      case 3: return old ^ uint64_t{1} << below(8 * f.size);
      case 4: return read(plan, fields[below(fields.size())]);
      default: return below(12);
    }
  }

  void change_once(Bytes& plan, const std::vector<Field>& fields) {
    if (below(8) == 0) {
      plan[below(plan.size())] = static_cast<uint8_t>(random_());
      return;
    }
    const Field f = fields[below(fields.size())];
    write(plan, f, value(plan, fields, f));
  }

  std::mt19937_64 random_;
};

// Of the thread that runs; others allocate when they start.
thread_local uint64_t allocations = 0;

void count_allocation(const volatile void*, size_t) { ++allocations; }
void ignore_release(const volatile void*) {}

// Several parts, the last one first.
void run_backwards(void*, int64_t begin, int64_t end, int64_t grain, qat_task task, void* context) {
  while (begin < end) {
    const int64_t start = end - begin > grain ? end - grain : begin;
    task(start, end, context);
    end = start;
  }
}

// Bytes of a tensor; 0 where it is larger than what is tested.
size_t bytes_of(const qat_tensor_info& info, int64_t batch) {
  constexpr int64_t most = 1 << 20;
  constexpr int64_t widths[] = {0, 1, 1, 2, 2, 4, 4};
  int64_t bytes = widths[info.type];
  for (int32_t d = 0; d < info.rank; ++d) {
    const int64_t size = info.sizes[d];
    if (size < -most || size > most) return 0;
    bytes *= size < 0 ? -size * batch : size;
    if (bytes > most) return 0;
  }
  return static_cast<size_t>(bytes);
}

using Memory = std::vector<std::unique_ptr<uint8_t[]>>;

// Memory for all inputs or outputs; false where one is too large.
bool make_memory(const qat_plan* plan, bool inputs, int64_t batch, Mutator& random, Memory& memory) {
  const int32_t count = inputs ? qat_plan_inputs(plan) : qat_plan_outputs(plan);
  for (int32_t i = 0; i < count; ++i) {
    qat_tensor_info info;
    if ((inputs ? qat_plan_input : qat_plan_output)(plan, i, &info) != QAT_OK) std::abort();
    const size_t bytes = bytes_of(info, batch);
    if (bytes == 0) return false;
    memory.emplace_back(new uint8_t[bytes]);
    for (size_t k = 0; k < bytes && inputs; ++k) memory.back()[k] = static_cast<uint8_t>(random.below(256));
    if (!inputs) std::memset(memory.back().get(), 0x55, bytes);
  }
  return true;
}

struct Counts {
  uint64_t loaded = 0, ran = 0, statuses[QAT_INTERNAL + 1] = {};
};

void run(const qat_plan* plan, Mutator& random, Counts& counts) {
  const int64_t batch = 1 + 2 * static_cast<int64_t>(random.below(2));
  qat_options options{};
  options.isa = random.below(2) == 0 ? "portable" : "";
  options.threads = 1 + static_cast<int32_t>(random.below(3));
  options.flags = QAT_POISON;
  if (random.below(4) != 0) options.parallel = run_backwards;
  options.memory_limit = 1 << 18;
  Memory inputs, outputs;
  if (!make_memory(plan, true, batch, random, inputs) || !make_memory(plan, false, batch, random, outputs)) return;
  qat_session* session = nullptr;
  const int status = qat_session_create(plan, batch, &options, &session);
  if (status == QAT_INTERNAL) std::abort();
  if (status != QAT_OK) return;
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const auto& memory : inputs) from.push_back(memory.get());
  for (const auto& memory : outputs) to.push_back(memory.get());
  const uint64_t before = allocations;
  if (qat_session_run(session, from.data(), to.data()) != QAT_OK) std::abort();
  if (allocations != before) {
    std::fprintf(stderr, "a run has allocated memory\n");
    std::abort();
  }
  ++counts.ran;
  qat_session_free(session);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: fuzz_plan COUNT SEED FILE...\n"), 2;
  __sanitizer_install_malloc_and_free_hooks(count_allocation, ignore_release);
  const uint64_t count = std::strtoull(argv[1], nullptr, 10), seed = std::strtoull(argv[2], nullptr, 10);
  std::vector<Bytes> plans;
  std::vector<std::vector<Field>> fields;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    plans.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    fields.push_back(Fields(plans.back()).all());
  }
  Counts counts;
  for (uint64_t i = 0; i < count; ++i) {
    // a generator for each input, so that one can be run alone
    Mutator random(seed * 1000003 + i);
    const size_t which = random.below(plans.size());
    const Bytes plan = i < plans.size() ? plans[i] : random.change(plans[which], fields[which]);
    // without spare capacity behind the end
    const std::unique_ptr<uint8_t[]> exact(new uint8_t[plan.size()]);
    std::copy(plan.begin(), plan.end(), exact.get());
    if (const char* path = std::getenv("FUZZ_LAST_INPUT")) {
      std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(plan.data()), plan.size());
    }
    qat_plan* loaded = nullptr;
    const int status = qat_plan_load(exact.get(), plan.size(), &loaded);
    if (status == QAT_INTERNAL || (i < plans.size() && status != QAT_OK)) {
      std::fprintf(stderr, "input %llu: %s\n", static_cast<unsigned long long>(i), qat_last_error());
      return 1;
    }
    ++counts.statuses[status];
    if (status != QAT_OK) continue;
    ++counts.loaded;
    run(loaded, random, counts);
    qat_plan_free(loaded);
  }
  std::printf("%llu inputs, %llu loaded, %llu run;", static_cast<unsigned long long>(count),
              static_cast<unsigned long long>(counts.loaded), static_cast<unsigned long long>(counts.ran));
  for (int status = 1; status <= QAT_INTERNAL; ++status) {
    std::printf(" %s %llu", qat_status_name(status), static_cast<unsigned long long>(counts.statuses[status]));
  }
  std::printf("\n");
  return 0;
}
