// Where every array of a session lies.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace qat {

// Whether the result has the bytes of input 0 in their order, so that it is input 0 under other sizes.
bool moves_nothing(const Operator& op, const std::vector<View>& arrays);

enum class Where : uint8_t { arena, input, output, constant };

struct Place {
  Where where;
  int64_t at;  // offset in the arena, number of the input or output, or array
};

struct Copy {
  size_t before;  // operator; their number: at the end
  Place from, to;
  int64_t bytes;
};

struct Memory {
  std::vector<Place> places;     // of every array
  std::vector<int64_t> scratch;  // offset in the arena, of every operator
  std::vector<Copy> copies;      // in the order of `before`
  int64_t bytes = 0;             // of the arena
};

// Inputs and outputs stay in the caller's memory where the kernels allow, results are written over operands that
// nothing needs any more, and the rest shares an arena. `scratch`: bytes that every operator needs.
Memory plan_memory(const Plan& plan, const std::vector<View>& arrays, const std::vector<int64_t>& scratch);

}  // namespace qat
