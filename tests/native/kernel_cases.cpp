// kernel_cases run ISA COUNT   a line "operator case hash" for every case
// kernel_cases best            the instruction sets that the dispatch takes here, of integer and of training kernels
// kernel_cases force ISA       runs instructions of an ARM set without asking the processor for it
#include "kernel_cases.h"

#include <cstdlib>

#include "integer/conv.h"
#include "integer/isa.h"
#include "kernels.h"

int main(int argc, char** argv) {
  const char* mode = argc > 1 ? argv[1] : "";
  if (std::strcmp(mode, "best") == 0) {
    std::printf("%s %s\n", qat::find_integer_isa(""), qat::find_kernels("")->isa);
    return 0;
  }
  if (std::strcmp(mode, "force") == 0 && argc == 3) {
    const bool matrices = std::strcmp(argv[2], "i8mm") == 0;
    const qat::Int8Kernels* kernels = matrices ? qat::int8_i8mm() : qat::int8_neondot();
    if (kernels == nullptr) return 3;
    std::printf("%lld\n", static_cast<long long>(kernels->peak(1)));
    return 0;
  }
  if (std::strcmp(mode, "run") != 0 || argc != 4) {
    std::fprintf(stderr, "usage: kernel_cases run ISA COUNT | best | force ISA\n");
    return 2;
  }
  const char* isa = argv[2];
  if (qat::find_integer_isa(isa) == nullptr) {
    std::fprintf(stderr, "this processor has no %s\n", isa);
    return 4;
  }
  const int count = std::atoi(argv[3]);
  cases::run_layers(isa, count);
  cases::run_operators(isa, count);
  // their instruction sets have names of their own
  const bool plain = std::strcmp(isa, "portable") == 0 || std::strcmp(isa, "avx2") == 0;
  cases::run_training(plain ? isa : "", count);
  return 0;
}
