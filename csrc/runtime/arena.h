// Offsets in one block of memory for buffers that are not all needed at the same time.
#pragma once

#include <cstdint>
#include <vector>

namespace qat {

struct Buffer {
  int64_t bytes;
  int64_t first, last;  // needed at these times and between them
  int64_t offset;
};

constexpr int64_t arena_alignment = 64;

// Sets the offsets, multiples of 64, and returns the bytes of the block: the largest buffer first, each in the smallest
// gap that holds it between those that are needed at the same time.
int64_t place_buffers(std::vector<Buffer>& buffers);

}  // namespace qat
