// Functions of a byte, and requantization of runs of codes by them.
#pragma once

#include "loops.h"
#include "view.h"

namespace qat {

constexpr int32_t byte_codes = 256;

// Entry i is for the byte i, whether it is the code i or i - 256.
struct ByteTable {
  uint8_t codes[byte_codes];
};

// Fills the table of a requantization from x to y if both have 8 bits and `count` codes are worth it.
bool requantize_table(const Loops& loops, const View& x, const View& y, int64_t count, ByteTable* table);

// n codes of x's grid to codes of y's; `table` as made above, or null.
void requantize_run(const Loops& loops, const View& x, const View& y, const ByteTable* table, const void* from,
                    int64_t n, void* to);

}  // namespace qat
