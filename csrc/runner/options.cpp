#include "options.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "npy.h"

namespace runner {

const char usage[] =
    R"(qat_run PLAN [options]: runs an integer network (model.qatplan) on this processor.

  --input [NAME=]FILE       array of an input (.npy, or plain bytes); once for each, in the plan's order if not named
  --output [NAME=]FILE      where to write an output (.npy, or plain bytes under another name)
  --input-type TYPE         what the files of inputs hold: "float" or "codes"; default: what the plan takes
  --output-type TYPE        what to write, likewise
  --samples N               runs for N sets of files: {} in their names is replaced by 0 to N-1
  --info                    prints inputs, outputs, their grids, the instruction set and memory
  --repeat N                measures N more runs of each set, and prints the shortest and the median time
  --profile                 prints the time of every operator, over the repeated runs
  --threads N               default 1
  --isa NAME                neon, neondot, i8mm, portable, ...; default: the best that the processor has
  --unchecked-isa           takes --isa although the processor may lack it (for tests: it then ends by SIGILL)

Arrays have the sizes that --info prints, whatever their type. Exit status: 0 done, 1 the machine failed (memory, disk),
2 wrong usage or bad input.
)";

namespace {

int64_t number(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  errno = 0;
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < low || value > high) {
    throw Failure(option + " " + text + ": is no number from " + std::to_string(low) + " to " + std::to_string(high) +
                  "; give one");
  }
  return value;
}

Elements elements(const std::string& option, const std::string& text) {
  if (text == "float") return Elements::floats;
  if (text == "codes") return Elements::codes;
  throw Failure(option + " " + text + ": is unknown; give float or codes");
}

}  // namespace

Options parse_options(int count, const char* const* words) {
  constexpr int64_t many = 1000000;
  Options o;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i], given;
    bool has_value = false;
    // --option=value; a NAME=FILE may have a sign of its own
    const size_t sign = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
    if (sign != std::string::npos) {
      given = word.substr(sign + 1);
      word.resize(sign);
      has_value = true;
    }
    const auto value = [&]() -> const std::string& {
      if (!has_value) {
        if (i + 1 >= count) throw Failure(word + ": has no value; see qat_run --help");
        given = words[++i];
        has_value = true;
      }
      return given;
    };
    const auto flag = [&] {
      if (has_value) throw Failure(word + ": takes no value; see qat_run --help");
      return true;
    };
    if (word == "--input") {
      o.inputs.push_back(value());
    } else if (word == "--output") {
      o.outputs.push_back(value());
    } else if (word == "--input-type") {
      o.input_type = elements(word, value());
    } else if (word == "--output-type") {
      o.output_type = elements(word, value());
    } else if (word == "--samples") {
      o.samples = number(word, value(), 1, many);
    } else if (word == "--repeat") {
      o.repeat = number(word, value(), 1, many);
    } else if (word == "--threads") {
      o.threads = static_cast<int32_t>(number(word, value(), 1, 1024));
    } else if (word == "--isa") {
      o.isa = value();
    } else if (word == "--unchecked-isa") {
      o.unchecked_isa = flag();
    } else if (word == "--profile") {
      o.profile = flag();
    } else if (word == "--info") {
      o.info = flag();
    } else if (word == "--help" || word == "-h") {
      o.help = flag();
    } else if (!word.empty() && word[0] == '-') {
      throw Failure(word + ": is no option; see qat_run --help");
    } else if (o.plan.empty()) {
      o.plan = word;
    } else {
      throw Failure(word + ": is a second plan; give inputs by --input");
    }
  }
  if (o.help) return o;
  if (o.plan.empty()) throw Failure("no plan is given; see qat_run --help");
  if (o.unchecked_isa && o.isa.empty()) throw Failure("--unchecked-isa: names no instruction set; give --isa too");
  return o;
}

}  // namespace runner
