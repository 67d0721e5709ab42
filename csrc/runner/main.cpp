// qat_run: a plan on the command line.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <map>
#include <new>

#include "network.h"

namespace runner {
namespace {

using Clock = std::chrono::steady_clock;

// The file of each border, "" where none is given.
std::vector<std::string> assign_files(const std::vector<std::string>& given, const std::vector<Border>& borders,
                                      const char* option) {
  std::vector<std::string> files(borders.size());
  size_t next = 0;
  for (const std::string& entry : given) {
    size_t index = borders.size();
    std::string path = entry;
    for (size_t i = 0; i < borders.size(); ++i) {
      const std::string prefix = std::string(borders[i].info.name) + "=";
      if (entry.compare(0, prefix.size(), prefix) == 0) {
        index = i;
        path = entry.substr(prefix.size());
      }
    }
    if (index == borders.size()) index = next++;
    if (index >= borders.size()) {
      throw Failure(std::string(option) + " " + entry + ": the plan has only " + std::to_string(borders.size()) +
                    "; see --info");
    }
    if (!files[index].empty()) {
      throw Failure(std::string(option) + " " + entry + ": is the second one for tensor '" + borders[index].info.name +
                    "'; give one for each");
    }
    if (path.empty()) throw Failure(std::string(option) + " " + entry + ": names no file; give NAME=FILE");
    files[index] = path;
  }
  return files;
}

std::string numbered(std::string path, int64_t number) {
  for (size_t at = 0; (at = path.find("{}", at)) != std::string::npos;) {
    const std::string text = std::to_string(number);
    path.replace(at, 2, text);
    at += text.size();
  }
  return path;
}

void print_border(const char* what, const Border& border) {
  std::string sizes;
  for (int32_t d = 0; d < border.info.rank; ++d) {
    const int64_t size = border.info.sizes[d];
    if (d > 0) sizes += ", ";
    sizes += size == -1 ? "batch" : size < 0 ? std::to_string(-size) + "*batch" : std::to_string(size);
  }
  const char* const type = npy_type(static_cast<qat_type>(border.info.type));
  std::printf("%s: %s, %s, [%s]", what, border.info.name, type, sizes.c_str());
  const qat_tensor_info& grid = border.codes;
  if (grid.scale > 0) {
    std::printf(", codes %s, scale %.9g, zero point %d, range [%d, %d]", npy_type(static_cast<qat_type>(grid.type)),
                static_cast<double>(grid.scale), grid.zero_point, grid.qmin, grid.qmax);
  }
  std::printf("\n");
}

void print_info(const Network& network, const qat_session* session, int64_t batch) {
  for (const Border& border : network.inputs()) print_border("input", border);
  for (const Border& border : network.outputs()) print_border("output", border);
  std::printf("operators: %d\n", qat_plan_operators(network.plan()));
  std::printf("memory: %lld bytes between operators, batch %lld\n",
              static_cast<long long>(qat_session_arena_bytes(session)), static_cast<long long>(batch));
}

// One set of arrays, in and out.
struct Run {
  std::vector<std::vector<uint8_t>> inputs, outputs;
  std::vector<const void*> from;
  std::vector<void*> to;

  void operator()(qat_session* session, const std::string& where) {
    const int status = qat_session_run(session, from.data(), to.data());
    if (status != QAT_OK) fail_runtime(status, where);
  }
};

void print_times(std::vector<double> milliseconds) {
  std::sort(milliseconds.begin(), milliseconds.end());
  const size_t n = milliseconds.size();
  const double median = n % 2 == 1 ? milliseconds[n / 2] : (milliseconds[n / 2 - 1] + milliseconds[n / 2]) / 2;
  std::printf("time: min %.3f ms, median %.3f ms, %zu runs\n", milliseconds.front(), median, n);
}

void print_profile(const qat_plan* plan, const std::vector<int64_t>& total, size_t runs) {
  int64_t sum = 0;
  for (int64_t t : total) sum += t;
  std::printf("%10s %6s  %-14s %s\n", "ms", "share", "kind", "operator");
  for (size_t i = 0; i < total.size(); ++i) {
    if (total[i] == 0) continue;
    const auto index = static_cast<int32_t>(i);
    std::printf("%10.4f %5.1f%%  %-14s %s\n", static_cast<double>(total[i]) / 1e6 / static_cast<double>(runs),
                100.0 * static_cast<double>(total[i]) / static_cast<double>(sum), qat_plan_operator_kind(plan, index),
                qat_plan_operator_name(plan, index));
  }
}

class Program {
 public:
  explicit Program(const Options& options) : options_(options), network_(options) {}

  void run() {
    const auto inputs = assign_files(options_.inputs, network_.inputs(), "--input");
    const auto outputs = assign_files(options_.outputs, network_.outputs(), "--output");
    if (options_.inputs.empty() && !network_.inputs().empty()) {
      if (!options_.info) {
        throw Failure("no --input is given; the plan has " + std::to_string(inputs.size()) + ", see --info");
      }
      print_info(network_, open(1), 1);
      return;
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].empty()) continue;
      throw Failure(std::string("tensor '") + network_.inputs()[i].info.name +
                    "': no --input is given for it; give NAME=FILE");
    }
    for (int64_t sample = 0; sample < options_.samples; ++sample) run_sample(inputs, outputs, sample);
    if (!times_.empty()) print_times(times_);
    if (options_.profile) print_profile(network_.plan(), total_, times_.size());
  }

 private:
  // Of a batch size; kept, as it has packed the weights.
  qat_session* open(int64_t batch) {
    Session& session = sessions_[batch];
    if (session == nullptr) {
      session = network_.open(batch);
      if (sessions_.size() == 1) std::printf("instruction set: %s\n", qat_session_isa(session.get()));
    }
    return session.get();
  }

  void run_sample(const std::vector<std::string>& inputs, const std::vector<std::string>& outputs, int64_t sample) {
    int64_t batch = 0;
    Run run;
    for (size_t i = 0; i < inputs.size(); ++i) {
      run.inputs.push_back(take_input(network_.inputs()[i], numbered(inputs[i], sample), &batch));
      run.from.push_back(run.inputs.back().data());
    }
    batch = std::max(batch, int64_t{1});
    qat_session* const session = open(batch);
    if (options_.info && sample == 0) print_info(network_, session, batch);
    for (const Border& border : network_.outputs()) {
      size_t bytes = type_bytes(static_cast<qat_type>(border.info.type));
      for (int64_t size : sizes_of(border.info, batch)) bytes *= static_cast<size_t>(size);
      run.outputs.emplace_back(bytes);
      run.to.push_back(run.outputs.back().data());
    }
    run(session, options_.plan);
    measure(run, session);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].empty()) {
        write_npy(numbered(outputs[i], sample), give_output(network_.outputs()[i], batch, run.outputs[i]));
      }
    }
  }

  void measure(Run& run, qat_session* session) {
    const int64_t repeat = options_.repeat > 0 ? options_.repeat : options_.profile ? 1 : 0;
    if (repeat == 0) return;
    qat_session_profile(session, options_.profile ? 1 : 0);
    for (int64_t i = 0; i < repeat; ++i) {
      const auto start = Clock::now();
      run(session, options_.plan);
      times_.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
    std::vector<int64_t> operators(static_cast<size_t>(qat_plan_operators(network_.plan())));
    total_.resize(operators.size());
    qat_session_times(session, operators.data());
    for (size_t i = 0; i < operators.size(); ++i) total_[i] += operators[i];
  }

  const Options& options_;
  const Network network_;
  std::map<int64_t, Session> sessions_;
  std::vector<double> times_;   // milliseconds of every measured run
  std::vector<int64_t> total_;  // nanoseconds of every operator, over those
};

}  // namespace
}  // namespace runner

int main(int count, char** words) {
  try {
    const runner::Options options = runner::parse_options(count, words);
    if (options.help) {
      std::fputs(runner::usage, stdout);
      return 0;
    }
    runner::Program(options).run();
    return std::fflush(stdout) == 0 ? 0 : 1;
  } catch (const runner::Failure& failure) {
    std::fprintf(stderr, "qat_run: %s\n", failure.what());
    return failure.status();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "qat_run: there is not enough memory; use a smaller batch\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qat_run: %s\n", error.what());
  }
  return 1;
}
