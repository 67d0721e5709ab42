// What every integer kernel takes: dense tensors with their grids, and threads.
//
// Tensors are row-major in their physical order. Those with spatial dimensions are stored channels last: (N, H, W, C).
#pragma once

#include <cstdint>

#include "grid.h"

namespace qat {

constexpr int max_rank = 8;

struct View {
  void* data;
  Type type;
  int32_t rank;
  int64_t sizes[max_rank];
  Grid grid;  // meaningless for f32

  int64_t count() const {
    int64_t n = 1;
    for (int32_t d = 0; d < rank; ++d) n *= sizes[d];
    return n;
  }
};

// Calls task(begin, end, context) for parts of [begin, end) of at least `grain`, on several threads, and waits for all.
// Tasks must not throw. No result may depend on the number, the size or the order of the parts.
using Task = void (*)(int64_t begin, int64_t end, void* context);
struct Threads {
  void (*run)(void* pool, int64_t begin, int64_t end, int64_t grain, Task task, void* context);
  void* pool;
  int32_t count;
};

// Runs everything on the calling thread.
inline void run_serially(void*, int64_t begin, int64_t end, int64_t, Task task, void* context) {
  if (begin < end) task(begin, end, context);
}

}  // namespace qat
