// Operators ready to run: everything that does not depend on data is computed here, once.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "plan.h"

namespace qat {

// Packed weights of a plan, which sessions share as long as one of them lives.
class WeightCache {
 public:
  // Of operator number `op` for an instruction set; packs them where there are none yet.
  std::shared_ptr<const PackedWeights> find(size_t op, const char* isa, const Weights& weights, Type x,
                                            bool transposed);

 private:
  std::mutex mutex_;
  std::map<std::pair<size_t, std::string>, std::weak_ptr<const PackedWeights>> packed_;
};

struct Machine {
  const char* isa;
  Threads threads;
};

// Operands are in the order of the plan, absent ones with null data; scratch is aligned to 64.
using Call = std::function<void(const Machine& machine, const View* x, const View& y, void* scratch)>;

struct Prepared {
  Call call;
  int64_t scratch = 0;
};

// `arrays` have passed check_plan. The call uses the plan and `arrays` no longer than it lives.
Prepared prepare_operator(const Plan& plan, size_t op, const std::vector<View>& arrays, const Machine& machine,
                          WeightCache& weights);

}  // namespace qat
