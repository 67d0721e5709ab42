// Which of the 8-bit kernels this processor, and its operating system, can run.
#include "isa.h"

#include <cstring>

#include "arm_features.h"
#include "conv.h"

namespace qat {
namespace {

#if defined(__x86_64__)
bool runs_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// gcc 12 and older clang have no name for it; with AVX2 the operating system saves the registers.
bool runs_avxvnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return runs_avx2() && (eax >> 4 & 1) != 0;
}
#endif

}  // namespace

const Int8Kernels* find_int8_kernels(const char* isa, bool unchecked) {
  struct Candidate {
    const Int8Kernels* kernels;  // null where the build lacks them
    bool runs;
  };
#if defined(__x86_64__)
  const Candidate candidates[] = {
      {int8_avx512vnni(), runs_avx512vnni()},
      {int8_avxvnni(), runs_avxvnni()},
      {int8_avx2(), runs_avx2()},
      {int8_portable(), true},
  };
#elif defined(__aarch64__)
  const Candidate candidates[] = {
      {int8_i8mm(), runs_i8mm()},
      {int8_neondot(), runs_neondot()},
      {int8_neon(), true},
      {int8_portable(), true},
  };
#else
  const Candidate candidates[] = {{int8_portable(), true}};
#endif
  const bool best = *isa == '\0' || std::strcmp(isa, "avx512") == 0;
  for (const Candidate& candidate : candidates) {
    if (candidate.kernels == nullptr) continue;
    if (best ? candidate.runs : std::strcmp(isa, candidate.kernels->isa) == 0 && (candidate.runs || unchecked)) {
      return candidate.kernels;
    }
  }
  return nullptr;
}

const char* find_integer_isa(const char* isa, bool unchecked) {
  const Int8Kernels* kernels = find_int8_kernels(isa, unchecked);
  return kernels == nullptr ? nullptr : kernels->isa;
}

}  // namespace qat
