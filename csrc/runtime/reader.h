// Little-endian values from bytes, with every access checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"

namespace qat {

class Reader {
 public:
  // [begin, end) of `bytes`.
  Reader(const uint8_t* bytes, uint64_t begin, uint64_t end) : bytes_(bytes), at_(begin), end_(end) {}

  uint64_t at() const { return at_; }
  uint64_t left() const { return end_ - at_; }

  uint8_t u8() { return static_cast<uint8_t>(integer(1)); }
  uint16_t u16() { return static_cast<uint16_t>(integer(2)); }
  uint32_t u32() { return static_cast<uint32_t>(integer(4)); }
  uint64_t u64() { return integer(8); }
  int32_t i32() { return static_cast<int32_t>(u32()); }
  int64_t i64() { return static_cast<int64_t>(u64()); }
  float f32() {
    const uint32_t bits = u32();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  std::string string() {
    const uint32_t size = u32();
    const uint8_t* from = take(size);
    return {reinterpret_cast<const char*>(from), size};
  }

  // The next `count` items of at least `bytes` each, before memory is reserved for them.
  void expect(uint64_t count, uint64_t bytes) const {
    if (count > left() / bytes) throw too_short();
  }

 private:
  static Error too_short() {
    return {QAT_INVALID_PLAN, "plan: a record extends beyond its section; write the plan again"};
  }

  const uint8_t* take(uint64_t size) {
    if (size > left()) throw too_short();
    const uint8_t* from = bytes_ + at_;
    at_ += size;
    return from;
  }

  uint64_t integer(uint32_t size) {
    const uint8_t* from = take(size);
    uint64_t value = 0;
    for (uint32_t i = 0; i < size; ++i) value |= uint64_t{from[i]} << 8 * i;
    return value;
  }

  const uint8_t* bytes_;
  uint64_t at_, end_;
};

// CRC-32 as zlib's.
uint32_t crc32(const uint8_t* bytes, uint64_t size);

}  // namespace qat
