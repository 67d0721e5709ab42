#include "reader.h"

#include <array>

namespace qat {
namespace {

// Entry [k][i] advances the checksum of byte i over k more zero bytes, so that eight bytes are taken at once.
std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ ((value & 1) != 0 ? 0xedb88320u : 0);
    tables[0][i] = value;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t i = 0; i < 256; ++i) tables[k][i] = tables[k - 1][i] >> 8 ^ tables[0][tables[k - 1][i] & 0xff];
  }
  return tables;
}

}  // namespace

uint32_t crc32(const uint8_t* bytes, uint64_t size) {
  static const auto tables = make_tables();
  uint32_t crc = 0xffffffffu;
  uint64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint32_t next = 0;
    for (size_t k = 0; k < 8; ++k) {
      const uint8_t byte = k < 4 ? static_cast<uint8_t>(bytes[i + k] ^ (crc >> 8 * k)) : bytes[i + k];
      next ^= tables[7 - k][byte];
    }
    crc = next;
  }
  for (; i < size; ++i) crc = crc >> 8 ^ tables[0][(crc ^ bytes[i]) & 0xff];
  return ~crc;
}

}  // namespace qat
