#include "loops.h"

#include <cstring>

namespace qat {
namespace {

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool runs_vbmi() { return runs_avx512() && __builtin_cpu_supports("avx512vbmi"); }

Loops with_vbmi(Loops loops) {
  loops.lookup = lookup_vbmi;
  return loops;
}
#endif

}  // namespace

const Loops& find_loops(const char* isa) {
#if defined(__x86_64__)
  static const bool avx2 = runs_avx2(), avx512 = runs_avx512();
  static const Loops wide = runs_vbmi() ? with_vbmi(loops_avx512()) : loops_avx512();
  if (avx512 && (*isa == '\0' || std::strncmp(isa, "avx512", 6) == 0)) return wide;
  if (avx2 && (*isa == '\0' || std::strncmp(isa, "avx", 3) == 0)) return loops_avx2();
#elif defined(__aarch64__)
  if (std::strcmp(isa, "portable") != 0) return loops_neon();
#else
  static_cast<void>(isa);
#endif
  return loops_portable();
}

}  // namespace qat
