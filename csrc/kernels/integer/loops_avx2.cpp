#if defined(__x86_64__)
#include "loops_body.h"

namespace qat {

const Loops& loops_avx2() {
  static constexpr Loops loops = make_loops(lookup_plain);
  return loops;
}

}  // namespace qat
#endif
