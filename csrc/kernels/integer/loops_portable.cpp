#include "loops_body.h"

namespace qat {

const Loops& loops_portable() {
  static constexpr Loops loops = make_loops(lookup_plain);
  return loops;
}

}  // namespace qat
