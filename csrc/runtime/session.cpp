#include "session.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "../kernels/integer/conv.h"
#include "check.h"

namespace qat {
namespace {

constexpr int32_t max_threads = 1024;
constexpr unsigned char poison = 0xaa;

int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

Session::Session(std::shared_ptr<const Plan> plan, std::shared_ptr<WeightCache> weights, int64_t batch,
                 const qat_options& options)
    : plan_(std::move(plan)), poison_((options.flags & QAT_POISON) != 0) {
  const char* isa = options.isa == nullptr ? "" : options.isa;
  const int32_t threads = options.threads == 0 ? 1 : options.threads;
  machine_.isa = find_integer_isa(isa, (options.flags & QAT_UNCHECKED_ISA) != 0);
  if (machine_.isa == nullptr) {
    const char* cause = find_integer_isa(isa, true) == nullptr ? "the library has no such instruction set"
                                                               : "this processor lacks the instructions";
    throw Error(QAT_INVALID_ARGUMENT, "isa '" + std::string(isa) + "': " + cause + "; leave it empty for the best");
  }
  if (batch < 1) {
    throw Error(QAT_INVALID_ARGUMENT, "batch " + std::to_string(batch) + ": is not positive; give 1 or more");
  }
  if (threads < 1 || threads > max_threads) {
    throw Error(QAT_INVALID_ARGUMENT,
                "threads " + std::to_string(threads) + ": is outside of [1, 1024]; give 0 for one");
  }
  if ((options.flags & ~(QAT_POISON | QAT_UNCHECKED_ISA)) != 0) throw Error(QAT_INVALID_ARGUMENT, "flags: has unknown bits; give 0");
  arrays_ = resolve_sizes(*plan_, batch);
  check_plan(*plan_, arrays_);
  machine_.threads = {options.parallel, options.parallel_context, threads};
  if (threads == 1) {
    machine_.threads = {run_serially, nullptr, 1};
  } else if (options.parallel == nullptr) {
    pool_ = std::make_unique<ThreadPool>(threads);
    machine_.threads = {ThreadPool::run, pool_.get(), threads};
  }

  const std::vector<Operator>& operators = plan_->operators;
  std::vector<int64_t> scratch;
  for (size_t i = 0; i < operators.size(); ++i) {
    Step step;
    step.output = arrays_[static_cast<size_t>(operators[i].output)];
    for (int32_t input : operators[i].inputs) {
      step.inputs.push_back(input == absent ? View{} : arrays_[static_cast<size_t>(input)]);
    }
    Prepared prepared;
    if (!moves_nothing(operators[i], arrays_)) {
      prepared = prepare_operator(*plan_, i, arrays_, machine_, *weights);
    }
    step.call = std::move(prepared.call);
    scratch.push_back(prepared.scratch);
    steps_.push_back(std::move(step));
  }
  memory_ = plan_memory(*plan_, arrays_, scratch);
  if (options.memory_limit > 0 && memory_.bytes > options.memory_limit) {
    throw Error(QAT_OUT_OF_MEMORY, "arena: needs " + std::to_string(memory_.bytes) + " bytes of a limit of " +
                                       std::to_string(options.memory_limit) + "; give more, or a smaller batch");
  }
  arena_ = AlignedBytes(static_cast<size_t>(memory_.bytes));
  times_.assign(operators.size(), 0);
}

void* Session::address(const Place& place, const void* const* inputs, void* const* outputs) const {
  switch (place.where) {
    case Where::arena: return arena_.data() + place.at;
    // nothing writes there
    case Where::input: return const_cast<void*>(inputs[place.at]);
    case Where::output: return outputs[place.at];
    default: return arrays_[static_cast<size_t>(place.at)].data;
  }
}

size_t Session::copy(size_t next, size_t before, const void* const* inputs, void* const* outputs) const {
  for (; next < memory_.copies.size() && memory_.copies[next].before == before; ++next) {
    const Copy& c = memory_.copies[next];
    std::memcpy(address(c.to, inputs, outputs), address(c.from, inputs, outputs), static_cast<size_t>(c.bytes));
  }
  return next;
}

void Session::run_step(size_t number, const void* const* inputs, void* const* outputs) {
  Step& step = steps_[number];
  if (!step.call) return;
  const Operator& op = plan_->operators[number];
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    if (op.inputs[i] == absent) continue;
    step.inputs[i].data = address(memory_.places[static_cast<size_t>(op.inputs[i])], inputs, outputs);
  }
  step.output.data = address(memory_.places[static_cast<size_t>(op.output)], inputs, outputs);
  step.call(machine_, step.inputs.data(), step.output, arena_.data() + memory_.scratch[number]);
}

void Session::run(const void* const* inputs, void* const* outputs) {
  if (poison_) std::memset(arena_.data(), poison, static_cast<size_t>(memory_.bytes));
  size_t next = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const int64_t start = profiling_ ? now() : 0;
    next = copy(next, i, inputs, outputs);
    run_step(i, inputs, outputs);
    if (profiling_ && steps_[i].call) times_[i] += now() - start;
  }
  copy(next, steps_.size(), inputs, outputs);
}

void Session::profile(bool on) {
  if (on) times_.assign(times_.size(), 0);
  profiling_ = on;
}

}  // namespace qat
