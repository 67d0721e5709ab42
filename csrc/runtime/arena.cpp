#include "arena.h"

#include <algorithm>

namespace qat {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + arena_alignment - 1) / arena_alignment * arena_alignment; }

}  // namespace

int64_t place_buffers(std::vector<Buffer>& buffers) {
  std::vector<Buffer*> order, placed, together;
  for (Buffer& buffer : buffers) order.push_back(&buffer);
  std::stable_sort(order.begin(), order.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  int64_t total = 0;
  for (Buffer* buffer : order) {
    together.clear();
    for (Buffer* other : placed) {
      if (other->first <= buffer->last && buffer->first <= other->last) together.push_back(other);
    }
    int64_t end = 0, best = -1, best_gap = 0;
    for (const Buffer* other : together) {
      const int64_t gap = other->offset - end;
      if (gap >= buffer->bytes && (best < 0 || gap < best_gap)) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, other->offset + round_up(other->bytes));
    }
    buffer->offset = best < 0 ? end : best;
    total = std::max(total, buffer->offset + round_up(buffer->bytes));
    // in order of offsets
    placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                   [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; }),
                  buffer);
  }
  return total;
}

}  // namespace qat
