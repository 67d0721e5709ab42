#if defined(__aarch64__)
#include "loops_body.h"
#include "neon_lookup.h"

namespace qat {
namespace {

void lookup(const uint8_t* table, const uint8_t* x, int64_t n, uint8_t* y) {
  if (n < 64) return lookup_plain(table, x, n, y);
  lookup_row(NeonTable(table), table, x, n, y);
}

}  // namespace

const Loops& loops_neon() {
  static constexpr Loops loops = make_loops(lookup);
  return loops;
}

}  // namespace qat
#endif
