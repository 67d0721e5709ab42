// Which elements QDrop leaves alone: a number that the element's place and a seed make, below a threshold.
//
// Of a counter instead of a stream, so that a backward pass makes it again, and threads in any order. The mixing is that of
// qat/quantizers/dropping.py, which has the same numbers.
#pragma once

#include <cstdint>

#include "hd.h"

namespace qat {

struct DropKey {
  uint32_t low, high;
};

// unnamed: the files of all instruction sets include this
namespace {

// Of the places from 2^32 * (first >> 32) on.
QAT_HD DropKey drop_key(int64_t seed, int64_t first) {
  const auto whole = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(whole),
          static_cast<uint32_t>(whole >> 32) + static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32) * 0x9e3779b9u};
}

// A whole number in [0, 2^24), of the lower 32 bits of a place.
QAT_HD float place_number(DropKey key, uint32_t place) {
  uint32_t v = place ^ key.low;
  v = (v ^ (v >> 16)) * 0x7feb352du + key.high;
  v = (v ^ (v >> 15)) * 0x846ca68bu;
  v ^= v >> 16;
  return static_cast<float>(static_cast<int32_t>(v >> 8));
}

}  // namespace

}  // namespace qat
