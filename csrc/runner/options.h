// What the command line says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace runner {


enum class Elements : uint8_t { own, floats, codes };

struct Options {
  std::string plan;
  std::vector<std::string> inputs, outputs;  // [NAME=]FILE
  Elements input_type = Elements::own, output_type = Elements::own;
  std::string isa;
  bool unchecked_isa = false;
  int32_t threads = 1;
  int64_t samples = 1;
  int64_t repeat = 0;
  bool profile = false, info = false, help = false;
};

extern const char usage[];

// Throws Failure.
Options parse_options(int count, const char* const* words);

}  // namespace runner
