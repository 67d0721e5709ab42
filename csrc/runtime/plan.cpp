#include "plan.h"

#include <algorithm>
#include <cstring>

#include "reader.h"

namespace qat {
namespace {

constexpr char magic[8] = {'Q', 'A', 'T', 'P', 'L', 'A', 'N', '\0'};
constexpr uint32_t version = 1;
constexpr uint64_t header_bytes = 64, alignment = 64;
// What kernels may read behind an operand.
constexpr uint64_t slack = 64;
constexpr const char* names[] = {
    "quantize",       "dequantize",    "requantize", "conv",      "matmul", "add",    "sub",  "mul",     "div",
    "concat",         "max_pool",      "avg_pool",   "mean",      "resize_nearest",   "resize_linear",   "pad",
    "transpose",      "slice",         "expand",     "roll",      "softmax", "layer_norm", "table", "prelu", "reshape",
};

struct Header {
  uint64_t data;
  uint32_t profile, tensors, constants, operators, inputs, outputs;
};

Header read_header(const uint8_t* bytes, uint64_t size) {
  if (size < sizeof magic || std::memcmp(bytes, magic, sizeof magic) != 0) {
    throw Error(QAT_NOT_A_PLAN, "plan: the bytes do not begin as a plan does; give a file that qat wrote");
  }
  if (size < header_bytes) throw Error(QAT_TRUNCATED, "plan: ends within its header; copy the file again");
  Reader r(bytes, sizeof magic, header_bytes);
  const uint32_t found = r.u32();
  if (found != version) {
    throw Error(QAT_UNSUPPORTED_VERSION, "plan: has version " + std::to_string(found) + ", this runner reads version " +
                                             std::to_string(version) + "; write it with the qat of this runner");
  }
  const uint32_t crc = r.u32();
  const uint64_t stated = r.u64();
  if (stated > size) {
    throw Error(QAT_TRUNCATED, "plan: has " + std::to_string(size) + " of " + std::to_string(stated) +
                                   " bytes; copy the file again");
  }
  if (stated < size) fail_plan("plan", "is followed by other bytes");
  if (crc != crc32(bytes + 16, size - 16)) {
    throw Error(QAT_CORRUPT, "plan: the checksum is wrong, so bytes were changed; copy the file again");
  }
  Header h{};
  h.data = r.u64();
  for (uint32_t* field : {&h.profile, &h.tensors, &h.constants, &h.operators, &h.inputs, &h.outputs}) {
    *field = r.u32();
  }
  if (h.data < header_bytes || h.data > size || h.data % alignment != 0) {
    fail_plan("plan", "the data section is not in the file or not aligned");
  }
  if (r.u64() != 0 || h.profile > 2) fail_plan("plan", "the header has unknown values");
  return h;
}

Grid read_grid(Reader& r) {
  Grid grid{};
  grid.scale = r.f32();
  grid.zero_point = r.i32();
  grid.qmin = r.i32();
  grid.qmax = r.i32();
  const uint8_t wide = r.u8();
  if (wide > 1) fail_plan("plan", "a grid has an unknown flag");
  grid.wide = wide != 0;
  return grid;
}

Array read_array(Reader& r) {
  Array a{};
  a.name = r.string();
  if (a.name.find('\0') != std::string::npos) fail_plan("plan", "a name has a zero byte");
  const uint8_t type = r.u8();
  if (type < 1 || type > 7) fail_plan("tensor '" + a.name + "'", "unknown type");
  a.type = static_cast<Type>(type);
  a.rank = r.u8();
  if (a.rank > max_rank) fail_plan("tensor '" + a.name + "'", "more than 8 dimensions");
  for (int32_t d = 0; d < a.rank; ++d) a.sizes[d] = r.i64();
  a.grid = read_grid(r);
  return a;
}

// Elements of a constant, no more than its bytes can hold.
uint64_t elements(const Array& a, uint64_t most) {
  uint64_t count = 1;
  for (int32_t d = 0; d < a.rank; ++d) {
    if (a.sizes[d] < 1 || count > most / static_cast<uint64_t>(a.sizes[d])) {
      fail_plan("constant '" + a.name + "'", "the sizes do not fit its bytes");
    }
    count *= static_cast<uint64_t>(a.sizes[d]);
  }
  return count;
}

void read_constant(Reader& r, Plan& plan, uint64_t data_bytes) {
  Array a = read_array(r);
  const uint64_t offset = r.u64(), bytes = r.u64();
  const std::string where = "constant '" + a.name + "'";
  if (offset % alignment != 0 || offset > data_bytes || bytes > data_bytes - offset || bytes > INT32_MAX) {
    fail_plan(where, "is not inside of the data section, not aligned, or above 2 GiB");
  }
  const uint64_t count = elements(a, a.type == Type::s4 ? 2 * bytes : bytes);
  uint64_t needed = count;
  if (a.type == Type::s4) needed = (count + 1) / 2;
  if (a.type == Type::u16 || a.type == Type::s16) needed = 2 * count;
  if (a.type == Type::s32 || a.type == Type::f32) needed = 4 * count;
  if (needed != bytes || count > INT32_MAX) fail_plan(where, "the sizes do not fit its bytes");
  a.data = plan.data.data() + offset;
  plan.arrays.push_back(std::move(a));
}

Operator read_operator(Reader& r, const Plan& plan) {
  const uint16_t kind = r.u16();
  Operator op{};
  op.name = r.string();
  const std::string where = "operator '" + op.name + "'";
  if (op.name.find('\0') != std::string::npos) fail_plan("plan", "a name has a zero byte");
  if (kind < 1 || kind > static_cast<uint16_t>(Kind::reshape)) fail_plan(where, "unknown kind");
  op.kind = static_cast<Kind>(kind);
  const uint16_t inputs = r.u16();
  r.expect(inputs, 4);
  for (uint16_t i = 0; i < inputs; ++i) {
    const int32_t input = r.i32();
    if (input < absent || input >= static_cast<int64_t>(plan.arrays.size())) fail_plan(where, "unknown input");
    op.inputs.push_back(input);
  }
  op.output = r.i32();
  if (op.output < 0 || op.output >= plan.tensors) fail_plan(where, "the output is no tensor");
  const uint16_t ints = r.u16();
  r.expect(ints, 8);
  for (uint16_t i = 0; i < ints; ++i) op.ints.push_back(r.i64());
  const uint16_t floats = r.u16();
  r.expect(floats, 4);
  for (uint16_t i = 0; i < floats; ++i) op.floats.push_back(r.f32());
  return op;
}

// Every tensor is written once, before it is read.
void check_flow(const Plan& plan) {
  std::vector<bool> written(static_cast<size_t>(plan.tensors));
  const auto write = [&](int32_t tensor, const std::string& where) {
    if (written[static_cast<size_t>(tensor)]) fail_plan(where, "writes a tensor that was written before");
    written[static_cast<size_t>(tensor)] = true;
  };
  for (int32_t input : plan.inputs) write(input, "plan: an input");
  for (const Operator& op : plan.operators) {
    for (int32_t input : op.inputs) {
      if (input == absent || plan.is_constant(input) || written[static_cast<size_t>(input)]) continue;
      fail_plan("operator '" + op.name + "'",
                "reads tensor '" + plan.arrays[static_cast<size_t>(input)].name + "' before it is written");
    }
    write(op.output, "operator '" + op.name + "'");
  }
  for (int32_t tensor = 0; tensor < plan.tensors; ++tensor) {
    if (!written[static_cast<size_t>(tensor)]) {
      fail_plan("tensor '" + plan.arrays[static_cast<size_t>(tensor)].name + "'", "nothing writes it");
    }
  }
}

}  // namespace

const char* kind_name(Kind kind) { return names[static_cast<int>(kind) - 1]; }

std::shared_ptr<const Plan> read_plan(const uint8_t* bytes, uint64_t size) {
  const Header h = read_header(bytes, size);
  auto plan = std::make_shared<Plan>();
  Plan& p = *plan;
  p.profile = static_cast<Profile>(h.profile);
  const uint64_t data_bytes = size - h.data;
  p.data = AlignedBytes(data_bytes + slack);
  if (data_bytes > 0) std::memcpy(p.data.data(), bytes + h.data, data_bytes);
  Reader r(bytes, header_bytes, h.data);
  // the fewest bytes that a record of each kind has
  r.expect(h.tensors, 23);
  r.expect(h.constants, 39);
  r.expect(h.operators, 16);
  p.tensors = static_cast<int32_t>(std::min<uint32_t>(h.tensors, INT32_MAX));
  for (uint32_t i = 0; i < h.tensors; ++i) {
    p.arrays.push_back(read_array(r));
    if (p.arrays.back().type == Type::s4) fail_plan("tensor '" + p.arrays.back().name + "'", "has 4 bits");
  }
  for (uint32_t i = 0; i < h.constants; ++i) read_constant(r, p, data_bytes);
  for (uint32_t i = 0; i < h.operators; ++i) p.operators.push_back(read_operator(r, p));
  const auto read_borders = [&](uint32_t count, std::vector<int32_t>& to) {
    r.expect(count, 4);
    for (uint32_t i = 0; i < count; ++i) {
      to.push_back(r.i32());
      if (to.back() < 0 || to.back() >= p.tensors) fail_plan("plan", "an input or output is no tensor");
    }
  };
  read_borders(h.inputs, p.inputs);
  read_borders(h.outputs, p.outputs);
  while (r.left() > 0) {
    if (r.u8() != 0) fail_plan("plan", "unknown bytes before the data section");
  }
  check_flow(p);
  return plan;
}

}  // namespace qat
