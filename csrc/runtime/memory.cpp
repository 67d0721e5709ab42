#include "memory.h"

#include <algorithm>

#include "../kernels/integer/parallel.h"
#include "arena.h"
#include "check.h"

namespace qat {
namespace {

constexpr int32_t none = -1;
// What kernels may read behind an operand, of nobody else's, who may be writing there.
constexpr int64_t slack = 64;

// Arrays that lie in the same memory, as one is another under other sizes.
struct Group {
  int64_t first = -1, last = -1;  // operators; none yet
  int32_t input = none;           // of the plan
  std::vector<int32_t> outputs;   // of the plan
  bool constant = false;
  bool overread = false;  // a kernel may read behind it, which must not leave the caller's memory
  int32_t buffer = none;
  int64_t bytes = 0;
};

// Inputs that kernels may read behind.
std::vector<size_t> overread_inputs(const Operator& op) {
  if (op.kind == Kind::conv) return {conv_x, conv_residual};
  if (op.kind == Kind::matmul) return {0};
  return {};
}

// Inputs that the result may be written over.
std::vector<size_t> replaceable_inputs(const Operator& op) {
  switch (op.kind) {
    case Kind::conv: return {conv_residual};
    case Kind::add:
    case Kind::sub:
    case Kind::mul:
    case Kind::div: return {0, 1};
    case Kind::requantize:
    case Kind::layer_norm:
    case Kind::table:
    case Kind::prelu: return {0};
    default: return {};
  }
}

class Planner {
 public:
  Planner(const Plan& plan, const std::vector<View>& arrays, const std::vector<int64_t>& scratch)
      : plan_(plan), arrays_(arrays), scratch_(scratch), root_(arrays.size()), groups_(arrays.size()) {}

  Memory run() {
    find_groups();
    find_uses();
    find_buffers();
    return make_memory();
  }

 private:
  Group& group(int32_t array) { return groups_[static_cast<size_t>(root_[static_cast<size_t>(array)])]; }
  int64_t bytes(int32_t array) const {
    const View& v = arrays_[static_cast<size_t>(array)];
    return v.count() * width_of(v.type);
  }
  int64_t end() const { return static_cast<int64_t>(plan_.operators.size()); }

  void find_groups() {
    for (size_t i = 0; i < root_.size(); ++i) root_[i] = static_cast<int32_t>(i);
    for (const Operator& op : plan_.operators) {
      if (!moves_nothing(op, arrays_)) continue;
      root_[static_cast<size_t>(op.output)] = root_[static_cast<size_t>(op.inputs[0])];
    }
  }

  void find_uses() {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      const auto array = static_cast<int32_t>(i);
      if (root_[i] != array) continue;
      groups_[i].constant = plan_.is_constant(array);
      groups_[i].bytes = bytes(array);
    }
    for (size_t i = 0; i < plan_.inputs.size(); ++i) group(plan_.inputs[i]).input = static_cast<int32_t>(i);
    for (size_t i = 0; i < plan_.outputs.size(); ++i) {
      group(plan_.outputs[i]).outputs.push_back(static_cast<int32_t>(i));
    }
    for (int64_t i = 0; i < end(); ++i) {
      const Operator& op = plan_.operators[static_cast<size_t>(i)];
      const auto use = [&](int32_t array) {
        Group& g = group(array);
        if (g.first < 0) g.first = i;
        g.last = i;
      };
      for (int32_t input : op.inputs) {
        if (input != absent) use(input);
      }
      use(op.output);
      for (size_t input : overread_inputs(op)) {
        if (op.has(input)) group(op.inputs[input]).overread = true;
      }
    }
  }

  // Where it stays without a buffer of its own.
  bool outside(const Group& g) const { return g.constant || (!g.overread && (g.input != none || !g.outputs.empty())); }

  int32_t add_buffer(int64_t size, int64_t first, int64_t last) {
    buffers_.push_back({size + slack, first, last, 0});
    return static_cast<int32_t>(buffers_.size()) - 1;
  }

  void give_buffer(Group& g) {
    if (g.buffer != none || outside(g)) return;
    // what a caller wants is kept to the end, but for inputs, which he has
    g.last = g.input == none && !g.outputs.empty() ? end() : g.last;
    g.buffer = add_buffer(g.bytes, g.first, g.last);
  }

  // An operand that operator number `i` is the last to need, and whose memory its result can have; or none.
  int32_t replaceable(int64_t i, const Operator& op) {
    const View& y = arrays_[static_cast<size_t>(op.output)];
    for (size_t k : replaceable_inputs(op)) {
      if (!op.has(k)) continue;
      const View& x = arrays_[static_cast<size_t>(op.inputs[k])];
      const Group& g = group(op.inputs[k]);
      const auto shares = [&](int32_t input) { return input != absent && &group(input) == &g; };
      const bool fits = width_of(x.type) == width_of(y.type) && x.count() == y.count();
      if (g.buffer == none || g.last != i || !fits) continue;
      if (std::count_if(op.inputs.begin(), op.inputs.end(), shares) == 1) return g.buffer;
    }
    return none;
  }

  void find_buffers() {
    for (int64_t i = 0; i < end(); ++i) {
      const Operator& op = plan_.operators[static_cast<size_t>(i)];
      for (int32_t input : op.inputs) {
        if (input != absent) give_buffer(group(input));
      }
      Group& result = group(op.output);
      // another name of an input has its memory already
      if (result.buffer == none && !outside(result)) {
        result.buffer = replaceable(i, op);
        if (result.buffer == none) {
          give_buffer(result);
        } else {
          if (!result.outputs.empty()) result.last = end();
          buffers_[static_cast<size_t>(result.buffer)].last = result.last;
        }
      }
      const int64_t needed = scratch_[static_cast<size_t>(i)];
      scratch_buffers_.push_back(needed > 0 ? add_buffer(needed, i, i) : none);
    }
  }

  Place place(const Group& g, int32_t root) const {
    if (g.buffer != none) return {Where::arena, buffers_[static_cast<size_t>(g.buffer)].offset};
    if (g.constant) return {Where::constant, root};
    if (g.input != none) return {Where::input, g.input};
    return {Where::output, g.outputs.empty() ? 0 : g.outputs[0]};
  }

  Memory make_memory() {
    Memory memory;
    memory.bytes = place_buffers(buffers_);
    for (int32_t root : root_) memory.places.push_back(place(groups_[static_cast<size_t>(root)], root));
    for (int32_t buffer : scratch_buffers_) {
      memory.scratch.push_back(buffer == none ? 0 : buffers_[static_cast<size_t>(buffer)].offset);
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& g = groups_[i];
      const Place own = place(g, static_cast<int32_t>(i));
      const Place given{Where::input, g.input};
      if (g.input != none && g.buffer != none) {
        memory.copies.push_back({static_cast<size_t>(g.first), given, own, g.bytes});
      }
      for (int32_t output : g.outputs) {
        if (own.where == Where::output && own.at == output) continue;
        const Place from = g.input != none ? given : own;
        memory.copies.push_back({plan_.operators.size(), from, {Where::output, output}, g.bytes});
      }
    }
    std::stable_sort(memory.copies.begin(), memory.copies.end(),
                     [](const Copy& a, const Copy& b) { return a.before < b.before; });
    return memory;
  }

  const Plan& plan_;
  const std::vector<View>& arrays_;
  const std::vector<int64_t>& scratch_;
  std::vector<int32_t> root_;  // of every array: the first of its group
  std::vector<Group> groups_;  // at the index of their root
  std::vector<Buffer> buffers_;
  std::vector<int32_t> scratch_buffers_;
};

// A permutation leaves the order of all dimensions that are not 1.
bool keeps_order(const View& x, const std::vector<int64_t>& perm) {
  int64_t before = -1;
  for (int64_t d : perm) {
    if (x.sizes[d] == 1) continue;
    if (d < before) return false;
    before = d;
  }
  return true;
}

}  // namespace

bool moves_nothing(const Operator& op, const std::vector<View>& arrays) {
  const auto array = [&](int32_t i) -> const View& { return arrays[static_cast<size_t>(i)]; };
  const View& y = array(op.output);
  switch (op.kind) {
    case Kind::reshape: return true;
    case Kind::requantize: return same_codes(array(op.inputs[0]), y);
    case Kind::concat: return op.inputs.size() == 1 && same_codes(array(op.inputs[0]), y);
    case Kind::expand:
    case Kind::pad: return array(op.inputs[0]).count() == y.count();
    case Kind::transpose: return keeps_order(array(op.inputs[0]), op.ints);
    case Kind::slice: {
      if (array(op.inputs[0]).count() != y.count()) return false;
      // a step may go backwards
      for (int32_t d = 0; d < y.rank; ++d) {
        if (y.sizes[d] > 1 && op.ints[static_cast<size_t>(y.rank + d)] != 1) return false;
      }
      return true;
    }
    default: return false;
  }
}

Memory plan_memory(const Plan& plan, const std::vector<View>& arrays, const std::vector<int64_t>& scratch) {
  return Planner(plan, arrays, scratch).run();
}

}  // namespace qat
