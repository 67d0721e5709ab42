#include "network.h"

#include <cstring>

namespace runner {
namespace {

std::string spell(const std::string& name) { return "tensor '" + name + "'"; }

// A size of -1 is the batch.
std::string spell_border(const qat_tensor_info& info) {
  std::string text;
  for (int32_t d = 0; d < info.rank; ++d) {
    const int64_t size = info.sizes[d];
    const std::string one = size >= 0 ? std::to_string(size) : size == -1 ? "batch" : std::to_string(-size) + "batch";
    text += (d == 0 ? "" : "x") + one;
  }
  return text.empty() ? "a scalar" : text;
}

int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

// How many samples an array of these sizes has, with `known` (0: not yet) from other inputs; 0 where the sizes do not
// fit.
int64_t batch_of(const qat_tensor_info& info, const std::vector<int64_t>& sizes, int64_t known) {
  if (sizes.size() != static_cast<size_t>(info.rank)) return 0;
  int64_t batch = known;
  for (size_t d = 0; d < sizes.size(); ++d) {
    const int64_t size = info.sizes[d];
    if (size >= 0 ? sizes[d] != size : sizes[d] == 0 || sizes[d] % -size != 0) return 0;
    if (size >= 0) continue;
    if (batch != 0 && sizes[d] / -size != batch) return 0;
    batch = sizes[d] / -size;
  }
  return batch == 0 ? 1 : batch;
}

// The sizes of plain bytes follow from their number.
std::vector<int64_t> raw_sizes(const Border& border, size_t bytes, int64_t known) {
  const qat_tensor_info& info = border.info;
  uint64_t sample = type_bytes(border.file_type);
  int32_t open = 0;
  for (int32_t d = 0; d < info.rank; ++d) {
    sample *= static_cast<uint64_t>(info.sizes[d] < 0 ? -info.sizes[d] : info.sizes[d]);
    open += info.sizes[d] < 0;
  }
  const auto batch = open == 1 && known == 0 ? static_cast<int64_t>(bytes / sample) : known == 0 ? 1 : known;
  return sizes_of(info, batch);
}

template <class Code>
bool all_within(const uint8_t* data, int64_t count, const qat_tensor_info& grid) {
  for (int64_t i = 0; i < count; ++i) {
    Code code;
    std::memcpy(&code, data + i * static_cast<int64_t>(sizeof code), sizeof code);
    if (code < grid.qmin || code > grid.qmax) return false;
  }
  return true;
}

bool codes_within(const uint8_t* data, int64_t count, const qat_tensor_info& grid) {
  switch (grid.type) {
    case QAT_U8: return all_within<uint8_t>(data, count, grid);
    case QAT_S8: return all_within<int8_t>(data, count, grid);
    case QAT_U16: return all_within<uint16_t>(data, count, grid);
    default: return all_within<int16_t>(data, count, grid);
  }
}

// Between floats and codes, from one buffer to another.
std::vector<uint8_t> converted(const Border& border, const std::vector<uint8_t>& from, bool to_codes, int64_t count) {
  const auto type = static_cast<qat_type>(to_codes ? border.codes.type : QAT_F32);
  std::vector<uint8_t> to(static_cast<size_t>(count) * type_bytes(type));
  const int status =
      to_codes ? qat_quantize(&border.codes, reinterpret_cast<const float*>(from.data()), count, to.data())
               : qat_dequantize(&border.codes, from.data(), count, reinterpret_cast<float*>(to.data()));
  if (status != QAT_OK) fail_runtime(status, spell(border.info.name));
  return to;
}

}  // namespace

void fail_runtime(int status, const std::string& where) {
  const bool machine = status == QAT_OUT_OF_MEMORY || status == QAT_INTERNAL;
  throw Failure(where + ": " + qat_last_error(), machine ? 1 : 2);
}

const char* npy_type(qat_type type) {
  switch (type) {
    case QAT_U8: return "u1";
    case QAT_S8: return "i1";
    case QAT_U16: return "u2";
    case QAT_S16: return "i2";
    case QAT_S32: return "i4";
    default: return "f4";
  }
}

size_t type_bytes(qat_type type) { return static_cast<size_t>(npy_type(type)[1] - '0'); }

Network::Network(const Options& options) : options_(options) {
  const std::vector<uint8_t> bytes = read_file(options.plan);
  qat_plan* plan = nullptr;
  const int status = qat_plan_load(bytes.data(), bytes.size(), &plan);
  if (status != QAT_OK) fail_runtime(status, options.plan);
  plan_.reset(plan);
  inputs_ = borders(true, options.input_type);
  outputs_ = borders(false, options.output_type);
}

std::vector<Border> Network::borders(bool input, Elements wanted) const {
  std::vector<Border> found(static_cast<size_t>(input ? qat_plan_inputs(plan()) : qat_plan_outputs(plan())));
  for (size_t i = 0; i < found.size(); ++i) {
    Border& border = found[i];
    const auto index = static_cast<int32_t>(i);
    int status = input ? qat_plan_input(plan(), index, &border.info) : qat_plan_output(plan(), index, &border.info);
    if (status != QAT_OK) fail_runtime(status, options_.plan);
    const bool floats = border.info.type == QAT_F32;
    border.convert = wanted != Elements::own && (wanted == Elements::floats) != floats;
    status = input ? qat_plan_input_codes(plan(), index, &border.codes)
                   : qat_plan_output_codes(plan(), index, &border.codes);
    if (status != QAT_OK) {
      if (border.convert) fail_runtime(status, options_.plan);
      border.codes = {};
    }
    const int32_t other = floats ? border.codes.type : int32_t{QAT_F32};
    border.file_type = static_cast<qat_type>(border.convert ? other : border.info.type);
  }
  return found;
}

Session Network::open(int64_t batch) const {
  qat_options options{};
  options.isa = options_.isa.c_str();
  options.threads = options_.threads;
  options.flags = options_.unchecked_isa ? QAT_UNCHECKED_ISA : 0;
  qat_session* session = nullptr;
  const int status = qat_session_create(plan(), batch, &options, &session);
  if (status != QAT_OK) fail_runtime(status, options_.plan);
  return Session(session);
}

std::vector<int64_t> sizes_of(const qat_tensor_info& info, int64_t batch) {
  std::vector<int64_t> sizes;
  for (int32_t d = 0; d < info.rank; ++d) sizes.push_back(info.sizes[d] < 0 ? -info.sizes[d] * batch : info.sizes[d]);
  return sizes;
}

std::vector<uint8_t> take_input(const Border& border, const std::string& path, int64_t* batch) {
  NpyArray array = read_npy(path);
  const std::string where = path + ": for " + spell(border.info.name) + ", ";
  const std::string type = npy_type(border.file_type);
  if (array.raw) {
    array.type = type;
    array.sizes = raw_sizes(border, array.data.size(), *batch);
  }
  if (array.type != type) {
    const bool other = array.type == npy_type(static_cast<qat_type>(border.codes.type)) || array.type == "f4";
    throw Failure(where + "has elements of type " + array.type + ", expected " + type + "; convert it" +
                  (other ? ", or give --input-type float or codes" : ""));
  }
  const int64_t found = batch_of(border.info, array.sizes, *batch);
  if (found == 0) {
    throw Failure(where + "has the sizes " + spell_sizes(array.sizes) + ", expected " + spell_border(border.info) +
                  (*batch == 0 ? "" : " with batch " + std::to_string(*batch)) + "; reshape it");
  }
  *batch = found;
  const int64_t count = count_of(array.sizes);
  const size_t bytes = static_cast<size_t>(count) * type_bytes(border.file_type);
  if (array.data.size() != bytes) {
    throw Failure(where + "has " + std::to_string(array.data.size()) + " bytes of elements, expected " +
                  std::to_string(bytes) + "; save it again");
  }
  const bool floats = border.file_type == QAT_F32;
  if (!floats && !codes_within(array.data.data(), count, border.codes)) {
    throw Failure(where + "has codes outside of [" + std::to_string(border.codes.qmin) + ", " +
                  std::to_string(border.codes.qmax) + "]; quantize it to that range");
  }
  return border.convert ? converted(border, array.data, floats, count) : std::move(array.data);
}

NpyArray give_output(const Border& border, int64_t batch, const std::vector<uint8_t>& bytes) {
  NpyArray array;
  array.type = npy_type(border.file_type);
  array.sizes = sizes_of(border.info, batch);
  array.data = border.convert ? converted(border, bytes, border.info.type == QAT_F32, count_of(array.sizes)) : bytes;
  return array;
}

}  // namespace runner
