// The C API: handles, and errors as statuses and messages.
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "../kernels/integer/conv.h"
#include "../kernels/integer/quantize.h"
#include "borders.h"
#include "check.h"
#include "session.h"

struct qat_plan {
  std::shared_ptr<const qat::Plan> plan;
  std::shared_ptr<qat::WeightCache> weights;
};

struct qat_session {
  qat::Session session;
};

namespace {

// Fixed, so that no message needs memory.
thread_local char last_error[1024] = "";

int fail(qat_status status, const char* message) noexcept {
  std::strncpy(last_error, message, sizeof last_error - 1);
  return status;
}

// Runs a function that throws, and returns the status.
template <class Function>
int guarded(const Function& function) noexcept {
  try {
    function();
    return QAT_OK;
  } catch (const qat::Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(QAT_OUT_OF_MEMORY, "memory: there is not enough; use a smaller batch");
  } catch (const std::length_error&) {
    return fail(QAT_OUT_OF_MEMORY, "memory: there is not enough; use a smaller batch");
  } catch (const std::system_error& error) {
    return fail(QAT_INTERNAL, error.what());
  } catch (const std::exception& error) {
    return fail(QAT_INTERNAL, error.what());
  }
}

void need(bool condition, const char* message) {
  if (!condition) throw qat::Error(QAT_INVALID_ARGUMENT, message);
}

void describe(const qat::Array& array, qat_tensor_info* info) {
  *info = {};
  info->name = array.name.c_str();
  info->type = static_cast<int32_t>(array.type);
  info->rank = array.rank;
  for (int32_t d = 0; d < array.rank; ++d) info->sizes[d] = array.sizes[d];
  if (!qat::is_codes(array.type)) return;
  info->scale = array.grid.scale;
  info->zero_point = array.grid.zero_point;
  info->qmin = array.grid.qmin;
  info->qmax = array.grid.qmax;
}

int describe_border(const qat_plan* plan, bool input, int32_t index, qat_tensor_info* info) {
  return guarded([&] {
    need(plan != nullptr && info != nullptr, "plan, info: is null; give both");
    const std::vector<int32_t>& tensors = input ? plan->plan->inputs : plan->plan->outputs;
    need(index >= 0 && static_cast<size_t>(index) < tensors.size(), "index: the plan has not so many; ask for less");
    describe(plan->plan->arrays[static_cast<size_t>(tensors[static_cast<size_t>(index)])], info);
  });
}

int describe_codes(const qat_plan* plan, bool input, int32_t index, qat_tensor_info* info) {
  qat_tensor_info border;
  const int status = describe_border(plan, input, index, &border);
  if (status != QAT_OK) return status;
  return guarded([&] {
    need(info != nullptr, "info: is null; give a place for the result");
    const auto& tensors = input ? plan->plan->inputs : plan->plan->outputs;
    describe(qat::border_codes(*plan->plan, tensors[static_cast<size_t>(index)], input), info);
    // the codes inside of the plan may lie in another order
    info->name = border.name;
    info->rank = border.rank;
    std::memcpy(info->sizes, border.sizes, sizeof info->sizes);
  });
}

// `count` elements in one row.
qat::View row(const void* data, qat::Type type, int64_t count) {
  qat::View view{};
  // the other one of two is written
  view.data = const_cast<void*>(data);
  view.type = type;
  view.rank = 1;
  view.sizes[0] = count;
  return view;
}

qat::View codes_row(const qat_tensor_info* info, const void* data, int64_t count) {
  need(info != nullptr && data != nullptr && count >= 0, "info, codes, count: is null or negative; give all of them");
  const auto type = static_cast<qat::Type>(info->type);
  qat::View view = row(data, type, count);
  view.grid = {info->scale, info->zero_point, info->qmin, info->qmax, false};
  need(qat::is_codes(type) && qat::is_grid(type, view.grid),
       "info: has no codes with a grid; give what qat_plan_input_codes or qat_plan_output_codes says");
  return view;
}

const qat::Operator* find_operator(const qat_plan* plan, int32_t index) {
  if (plan == nullptr || index < 0 || static_cast<size_t>(index) >= plan->plan->operators.size()) return nullptr;
  return &plan->plan->operators[static_cast<size_t>(index)];
}

void check_pointers(const void* const* pointers, size_t count, const char* message) {
  need(pointers != nullptr || count == 0, message);
  for (size_t i = 0; i < count; ++i) need(pointers[i] != nullptr, message);
}

}  // namespace

extern "C" {

const char* qat_last_error(void) { return last_error; }

const char* qat_status_name(int status) {
  switch (status) {
    case QAT_OK: return "QAT_OK";
    case QAT_INVALID_ARGUMENT: return "QAT_INVALID_ARGUMENT";
    case QAT_NOT_A_PLAN: return "QAT_NOT_A_PLAN";
    case QAT_UNSUPPORTED_VERSION: return "QAT_UNSUPPORTED_VERSION";
    case QAT_TRUNCATED: return "QAT_TRUNCATED";
    case QAT_CORRUPT: return "QAT_CORRUPT";
    case QAT_INVALID_PLAN: return "QAT_INVALID_PLAN";
    case QAT_OUT_OF_MEMORY: return "QAT_OUT_OF_MEMORY";
    case QAT_INTERNAL: return "QAT_INTERNAL";
    default: return "unknown status";
  }
}

int qat_runtime_version(void) { return QAT_RUNTIME_VERSION; }

const char* qat_find_isa(const char* isa) { return qat::find_integer_isa(isa == nullptr ? "" : isa); }

int qat_plan_load(const void* bytes, size_t size, qat_plan** plan) {
  return guarded([&] {
    need(plan != nullptr, "plan: is null; give a place for the result");
    *plan = nullptr;
    need(bytes != nullptr, "bytes: is null; give the file");
    auto read = qat::read_plan(static_cast<const uint8_t*>(bytes), size);
    // other batch sizes are looked at by their sessions
    qat::check_plan(*read, qat::resolve_sizes(*read, 1));
    *plan = new qat_plan{std::move(read), std::make_shared<qat::WeightCache>()};
  });
}

void qat_plan_free(qat_plan* plan) { delete plan; }

int32_t qat_plan_inputs(const qat_plan* plan) {
  return plan == nullptr ? 0 : static_cast<int32_t>(plan->plan->inputs.size());
}

int32_t qat_plan_outputs(const qat_plan* plan) {
  return plan == nullptr ? 0 : static_cast<int32_t>(plan->plan->outputs.size());
}

int qat_plan_input(const qat_plan* plan, int32_t index, qat_tensor_info* info) {
  return describe_border(plan, true, index, info);
}

int qat_plan_output(const qat_plan* plan, int32_t index, qat_tensor_info* info) {
  return describe_border(plan, false, index, info);
}

int qat_plan_input_codes(const qat_plan* plan, int32_t index, qat_tensor_info* info) {
  return describe_codes(plan, true, index, info);
}

int qat_plan_output_codes(const qat_plan* plan, int32_t index, qat_tensor_info* info) {
  return describe_codes(plan, false, index, info);
}

int qat_quantize(const qat_tensor_info* info, const float* values, int64_t count, void* codes) {
  return guarded([&] {
    const qat::View y = codes_row(info, codes, count);
    need(values != nullptr, "values: is null; give the floats");
    qat::quantize("", {qat::run_serially, nullptr, 1}, row(values, qat::Type::f32, count), y, nullptr);
  });
}

int qat_dequantize(const qat_tensor_info* info, const void* codes, int64_t count, float* values) {
  return guarded([&] {
    const qat::View x = codes_row(info, codes, count);
    need(values != nullptr, "values: is null; give a place for the floats");
    qat::dequantize("", {qat::run_serially, nullptr, 1}, x, row(values, qat::Type::f32, count), nullptr);
  });
}

int32_t qat_plan_operators(const qat_plan* plan) {
  return plan == nullptr ? 0 : static_cast<int32_t>(plan->plan->operators.size());
}

const char* qat_plan_operator_name(const qat_plan* plan, int32_t index) {
  const qat::Operator* op = find_operator(plan, index);
  return op == nullptr ? nullptr : op->name.c_str();
}

const char* qat_plan_operator_kind(const qat_plan* plan, int32_t index) {
  const qat::Operator* op = find_operator(plan, index);
  return op == nullptr ? nullptr : qat::kind_name(op->kind);
}

int qat_session_create(const qat_plan* plan, int64_t batch, const qat_options* options, qat_session** session) {
  return guarded([&] {
    need(session != nullptr, "session: is null; give a place for the result");
    *session = nullptr;
    need(plan != nullptr, "plan: is null; load one");
    *session = new qat_session{{plan->plan, plan->weights, batch, options == nullptr ? qat_options{} : *options}};
  });
}

void qat_session_free(qat_session* session) { delete session; }

int qat_session_run(qat_session* session, const void* const* inputs, void* const* outputs) {
  return guarded([&] {
    need(session != nullptr, "session: is null; create one");
    const qat::Plan& plan = session->session.plan();
    check_pointers(inputs, plan.inputs.size(), "inputs: a pointer is null; give one for each input");
    check_pointers(outputs, plan.outputs.size(), "outputs: a pointer is null; give one for each output");
    session->session.run(inputs, outputs);
  });
}

int64_t qat_session_arena_bytes(const qat_session* session) {
  return session == nullptr ? 0 : session->session.arena_bytes();
}

const char* qat_session_isa(const qat_session* session) { return session == nullptr ? nullptr : session->session.isa(); }

int qat_session_profile(qat_session* session, int on) {
  return guarded([&] {
    need(session != nullptr, "session: is null; create one");
    session->session.profile(on != 0);
  });
}

int qat_session_times(const qat_session* session, int64_t* nanoseconds) {
  return guarded([&] {
    need(session != nullptr && nanoseconds != nullptr, "session, nanoseconds: is null; give both");
    const std::vector<int64_t>& times = session->session.times();
    if (!times.empty()) std::memcpy(nanoseconds, times.data(), times.size() * sizeof times[0]);
  });
}

}  // extern "C"
