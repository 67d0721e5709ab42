// Which instruction sets this processor, and its operating system, can run.
#include <cstring>

#include "kernels.h"

namespace qat {
namespace {

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace

const Kernels* find_kernels(const char* isa) {
  const Kernels* const runnable[] = {
      runs_avx512() ? avx512_kernels() : nullptr,
      runs_avx2() ? avx2_kernels() : nullptr,
      neon_kernels(),  // every aarch64 has it
      portable_kernels(),
  };
  for (const Kernels* kernels : runnable) {
    if (kernels != nullptr && (*isa == '\0' || std::strcmp(isa, kernels->isa) == 0)) return kernels;
  }
  return nullptr;
}

}  // namespace qat
