// A plan made ready for one batch size: sizes, packed weights, memory, threads.
#pragma once

#include <memory>
#include <vector>

#include "memory.h"
#include "operators.h"
#include "qat_runtime.h"
#include "thread_pool.h"

namespace qat {

class Session {
 public:
  // Throws Error, std::bad_alloc and std::system_error.
  Session(std::shared_ptr<const Plan> plan, std::shared_ptr<WeightCache> weights, int64_t batch,
          const qat_options& options);

  // Allocates nothing.
  void run(const void* const* inputs, void* const* outputs);

  const Plan& plan() const { return *plan_; }
  int64_t arena_bytes() const { return memory_.bytes; }
  const char* isa() const { return machine_.isa; }
  void profile(bool on);
  const std::vector<int64_t>& times() const { return times_; }

 private:
  struct Step {
    Call call;                 // null: costs nothing
    std::vector<View> inputs;  // whose data is set before each run
    View output;
  };

  void* address(const Place& place, const void* const* inputs, void* const* outputs) const;
  void run_step(size_t number, const void* const* inputs, void* const* outputs);
  // Those before an operator, from copy number `next` on; returns the number of the following one.
  size_t copy(size_t next, size_t before, const void* const* inputs, void* const* outputs) const;

  std::shared_ptr<const Plan> plan_;
  std::vector<View> arrays_;
  std::unique_ptr<ThreadPool> pool_;
  Machine machine_;
  std::vector<Step> steps_;
  Memory memory_;
  AlignedBytes arena_;
  bool poison_;
  bool profiling_ = false;
  std::vector<int64_t> times_;  // nanoseconds, of every operator
};

}  // namespace qat
