// A plan in memory: what the file says, in order. It never changes after it was read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../kernels/integer/pack.h"
#include "../kernels/integer/view.h"

namespace qat {

// The values are those of the plan file.
enum class Kind : uint16_t {
  quantize = 1,
  dequantize,
  requantize,
  conv,
  matmul,
  add,
  sub,
  mul,
  div,
  concat,
  max_pool,
  avg_pool,
  mean,
  resize_nearest,
  resize_linear,
  pad,
  transpose,
  slice,
  expand,
  roll,
  softmax,
  layer_norm,
  table,
  prelu,
  reshape,
};
const char* kind_name(Kind kind);

// A tensor or a constant. A size of -k is k times the batch size.
struct Array {
  std::string name;
  Type type;
  int32_t rank;
  int64_t sizes[max_rank];
  Grid grid;
  const void* data = nullptr;  // of a constant
};

constexpr int32_t absent = -1;

struct Operator {
  Kind kind;
  std::string name;
  std::vector<int32_t> inputs;  // arrays, or `absent`
  int32_t output;               // array
  std::vector<int64_t> ints;
  std::vector<float> floats;

  bool has(size_t input) const { return input < inputs.size() && inputs[input] != absent; }
};

struct Plan {
  Profile profile;
  std::vector<Array> arrays;  // tensors, then constants
  int32_t tensors;
  std::vector<Operator> operators;
  std::vector<int32_t> inputs, outputs;  // tensors
  AlignedBytes data;

  bool is_constant(int32_t array) const { return array >= tensors; }
};

// Reads and checks what the records say each for itself, and that every tensor is written once, before it is read.
// Shapes and values are the matter of `check_plan`. Throws Error.
std::shared_ptr<const Plan> read_plan(const uint8_t* bytes, uint64_t size);

inline bool is_codes(Type type) {
  return type == Type::u8 || type == Type::s8 || type == Type::u16 || type == Type::s16;
}

}  // namespace qat
