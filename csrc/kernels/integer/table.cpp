#include "table.h"

#include <algorithm>
#include <cstring>

#include "byte_table.h"
#include "loops.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;

template <class Code, class Result>
void look_up(const Threads& threads, const View& x, const void* table, const View& y) {
  const auto* from = static_cast<const Code*>(x.data);
  const auto* codes = static_cast<const Result*>(table);
  auto* to = static_cast<Result*>(y.data);
  const int32_t qmin = x.grid.qmin, last = x.grid.qmax - qmin;
  parallel(threads, y.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = codes[std::clamp(from[i] - qmin, 0, last)];
  });
}

template <class Result>
void look_up_typed(const Threads& threads, const View& x, const void* table, const View& y) {
  switch (x.type) {
    case Type::u8: return look_up<uint8_t, Result>(threads, x, table, y);
    case Type::s8: return look_up<int8_t, Result>(threads, x, table, y);
    case Type::u16: return look_up<uint16_t, Result>(threads, x, table, y);
    default: return look_up<int16_t, Result>(threads, x, table, y);
  }
}

}  // namespace

void apply_table(const char* isa, const Threads& threads, const View& x, const void* table, const View& y) {
  if (width_of(y.type) != 1) return look_up_typed<uint16_t>(threads, x, table, y);
  if (width_of(x.type) != 1) return look_up_typed<uint8_t>(threads, x, table, y);
  ByteTable bytes;
  const auto* codes = static_cast<const uint8_t*>(table);
  for (int32_t i = 0; i < byte_codes; ++i) {
    const int32_t code = x.type == Type::s8 && i > 127 ? i - 256 : i;
    bytes.codes[i] = codes[std::clamp(code, x.grid.qmin, x.grid.qmax) - x.grid.qmin];
  }
  const Loops& loops = find_loops(isa);
  parallel(threads, y.count(), 1, [&](int64_t begin, int64_t end) {
    loops.lookup(bytes.codes, static_cast<const uint8_t*>(x.data) + begin, end - begin,
                 static_cast<uint8_t*>(y.data) + begin);
  });
}

void prelu(const char* isa, const Threads& threads, const View& x, const float* slope, int64_t slopes, int32_t axis,
           const View& y) {
  const Loops& loops = find_loops(isa);
  // rows of one slope, or of all of them in turn
  int64_t columns = 1;
  for (int32_t d = axis + 1; d < x.rank && slopes > 1; ++d) columns *= x.sizes[d];
  const bool in_turn = slopes > 1 && columns == 1;
  if (in_turn) columns = slopes;
  if (slopes == 1) columns = std::min<int64_t>(y.count(), tile);
  const int64_t count = y.count();
  if (count == 0) return;
  parallel(threads, (count + columns - 1) / columns, columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * columns, length = std::min(columns, count - first);
      for (int64_t start = 0; start < length; start += tile) {
        const int64_t n = std::min(tile, length - start);
        float real[tile];
        loops.dequantize(x.type, x.grid, at(x.data, x.type, first + start), n, real);
        loops.prelu(in_turn ? slope + start : slope + (slopes > 1 ? row % slopes : 0), in_turn ? 1 : 0, n, real);
        loops.quantize(y.type, y.grid, real, n, at(y.data, y.type, first + start));
      }
    }
  });
}

}  // namespace qat
