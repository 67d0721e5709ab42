#include "normalize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "loops.h"
#include "parallel.h"

namespace qat {
namespace {

constexpr int64_t tile = 256;

// Rows side by side whose sums run at the same time, as each has to add its terms in order.
constexpr int64_t rows_at_once = 8;

// y = round(x / scale) + zero_point, for one probability.
int32_t quantize_one(float x, const Grid& y) {
  const float steps = std::nearbyint(x / y.scale);
  return static_cast<int32_t>(std::clamp(steps, static_cast<float>(y.qmin - y.zero_point),
                                         static_cast<float>(y.qmax - y.zero_point))) +
         y.zero_point;
}

// What a row needs of its codes: the largest one, and the sum of their exponentials.
struct RowSum {
  int32_t largest;
  float sum;
};

template <class Code>
RowSum sum_row(const Code* x, int64_t length, int64_t stride, const float* exponentials) {
  Code most = x[0];
  for (int64_t i = 1; i < length; ++i) most = std::max(most, x[i * stride]);
  const float* table = exponentials + 255 - most;
  float sum = 0.0f;
  for (int64_t i = 0; i < length; ++i) sum = sum + table[x[i * stride]];
  return {most, sum};
}

// Several rows, one behind the other.
template <class Code>
void sum_rows(const Code* x, int64_t length, const float* exponentials, RowSum* rows) {
  const float* tables[rows_at_once];
  for (int64_t r = 0; r < rows_at_once; ++r) {
    const Code* row = x + r * length;
    Code most = row[0];
    for (int64_t i = 1; i < length; ++i) most = std::max(most, row[i]);
    rows[r].largest = most;
    tables[r] = exponentials + 255 - most;
  }
  float sums[rows_at_once] = {};
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t r = 0; r < rows_at_once; ++r) sums[r] = sums[r] + tables[r][x[r * length + i]];
  }
  for (int64_t r = 0; r < rows_at_once; ++r) rows[r].sum = sums[r];
}

// One row: the result of every code that it can have, then one lookup a code.
template <class Code>
void write_row(const Loops& loops, const SoftmaxTable& table, const Code* x, int64_t length, int64_t stride,
               const RowSum& row, uint8_t* y) {
  uint8_t shares[256], codes[256];
  loops.shares(table.exponentials, row.sum, shares);
  loops.lookup(table.result, shares, 256, shares);
  // entry i of `shares` is for the code i - 255 + largest, whose byte are its low bits
  const int32_t largest = row.largest;
  if (largest >= 0) std::memcpy(codes, shares + 255 - largest, static_cast<size_t>(largest) + 1);
  if (std::is_signed_v<Code>) {
    std::memcpy(codes + 128, shares + 127 - largest, static_cast<size_t>(std::min(largest, -1) + 129));
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(x);
  if (stride == 1) return loops.lookup(codes, bytes, length, y);
  for (int64_t i = 0; i < length; ++i) y[i * stride] = codes[bytes[i * stride]];
}

template <class Code>
void softmax8(const Loops& loops, const Threads& threads, const View& x, int64_t length, int64_t inner,
              const SoftmaxTable& table, const View& y) {
  const auto* from = static_cast<const Code*>(x.data);
  auto* to = static_cast<uint8_t*>(y.data);
  parallel(threads, x.count() / length, length * 2 + 256, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; inner == 1 && row + rows_at_once <= end; row += rows_at_once) {
      RowSum sums[rows_at_once];
      sum_rows(from + row * length, length, table.exponentials, sums);
      for (int64_t r = 0; r < rows_at_once; ++r) {
        const int64_t offset = (row + r) * length;
        write_row(loops, table, from + offset, length, 1, sums[r], to + offset);
      }
    }
    for (; row < end; ++row) {
      const int64_t offset = row / inner * inner * length + row % inner;
      const RowSum sum = sum_row(from + offset, length, inner, table.exponentials);
      write_row(loops, table, from + offset, length, inner, sum, to + offset);
    }
  });
}

// Softmax in double of dequantized codes, any types.
template <class Code>
void softmax_wide(const Loops& loops, const Threads& threads, const View& x, int64_t length, int64_t inner,
                  const View& y) {
  const auto* from = static_cast<const Code*>(x.data);
  const int32_t zero_point = x.grid.zero_point;
  const float scale = x.grid.scale;
  parallel(threads, x.count() / length, length * 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row / inner * inner * length + row % inner;
      const auto real = [&](int64_t i) -> double {
        return scale * static_cast<float>(from[offset + i * inner] - zero_point);
      };
      double largest = real(0);
      for (int64_t i = 1; i < length; ++i) largest = std::max(largest, real(i));
      double sum = 0.0;
      for (int64_t i = 0; i < length; ++i) sum += std::exp(real(i) - largest);
      for (int64_t start = 0; start < length; start += tile) {
        const int64_t n = std::min(tile, length - start);
        float share[tile];
        uint16_t codes[tile];
        for (int64_t i = 0; i < n; ++i) share[i] = static_cast<float>(std::exp(real(start + i) - largest) / sum);
        loops.quantize(y.type, y.grid, share, n, codes);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t index = offset + (start + i) * inner;
          if (width_of(y.type) == 1) {
            static_cast<uint8_t*>(y.data)[index] = reinterpret_cast<const uint8_t*>(codes)[i];
          } else {
            static_cast<uint16_t*>(y.data)[index] = codes[i];
          }
        }
      }
    }
  });
}

}  // namespace

SoftmaxTable prepare_softmax(const Grid& x, const Grid& y, int64_t length) {
  SoftmaxTable table;
  // head room for the sum; the division and the logarithm are float32, the rest double
  const float share = std::numeric_limits<float>::max() / static_cast<float>(length);
  const double scale = x.scale;
  const double room = std::max(0.0, static_cast<double>(static_cast<float>(std::log(double{share}))) - 5.0) / scale;
  // QLinearSoftmax gives 256ths
  const bool same = y.scale == 1.0f / 256.0f && y.zero_point == 0 && y.qmin == 0 && y.qmax == 255;
  for (int32_t i = 0; i < 256; ++i) {
    table.exponentials[i] = static_cast<float>(std::exp((i - 255.0 + room) * scale));
    const float probability = 1.0f / 256.0f * static_cast<float>(i);
    table.result[i] = static_cast<uint8_t>(same ? i : quantize_one(probability, y));
  }
  return table;
}

void softmax(const char* isa, const Threads& threads, const View& x, int32_t axis, const SoftmaxTable* table,
             const View& y) {
  const Loops& loops = find_loops(isa);
  const int64_t length = x.sizes[axis];
  if (x.count() == 0) return;
  int64_t inner = 1;
  for (int32_t d = axis + 1; d < x.rank; ++d) inner *= x.sizes[d];
  const bool wide = x.grid.wide || y.grid.wide;
  switch (x.type) {
    case Type::u8:
      if (wide) return softmax_wide<uint8_t>(loops, threads, x, length, inner, y);
      return softmax8<uint8_t>(loops, threads, x, length, inner, *table, y);
    case Type::s8:
      if (wide) return softmax_wide<int8_t>(loops, threads, x, length, inner, y);
      return softmax8<int8_t>(loops, threads, x, length, inner, *table, y);
    case Type::u16: return softmax_wide<uint16_t>(loops, threads, x, length, inner, y);
    default: return softmax_wide<int16_t>(loops, threads, x, length, inner, y);
  }
}

void layer_norm(const char* isa, const Threads& threads, const View& x, int32_t axes, const float* weight,
                const float* bias, float epsilon, const View& y) {
  const Loops& loops = find_loops(isa);
  int64_t length = 1;
  for (int32_t d = x.rank - axes; d < x.rank; ++d) length *= x.sizes[d];
  if (x.count() == 0) return;
  const Type types[] = {x.type, y.type};
  const Grid grids[] = {x.grid, y.grid};
  parallel(threads, x.count() / length, length * 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      loops.layer_norm(types, grids, at(x.data, x.type, row * length), length, weight, bias, epsilon,
                       at(y.data, y.type, row * length));
    }
  });
}

}  // namespace qat
