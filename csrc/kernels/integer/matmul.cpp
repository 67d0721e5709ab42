// Products of two activations: the right one is packed as weights are, at run time.
#include <algorithm>
#include <cstring>

#include "conv.h"
#include "pack.h"
#include "parts.h"
#include "requantize.h"

namespace qat {
namespace {

constexpr int32_t raw_rows = 48;
// Rows of the left activation that are made words at a time, where the kernels multiply those.
constexpr int64_t wide_rows = 240;

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Columns are cut into panels of `units`, the last one included.
struct Plan {
  const Int8Kernels* kernels;
  int32_t units;
  int64_t panels, steps;
  int64_t panel_bytes, columns_bytes, rows_bytes, pointers_bytes, raw_bytes;
  int64_t wide_row_bytes, wide_bytes;  // of an activation's copy as words, or 0

  Plan(const char* isa, const MatmulShape& s) : kernels(find_int8_kernels(isa, true)) {
    const int64_t all_units = (s.n + unit_columns - 1) / unit_columns;
    panels = (all_units + kernels->units - 1) / kernels->units;
    units = static_cast<int32_t>((all_units + panels - 1) / std::max<int64_t>(panels, 1));
    const int32_t group = kernels->group();
    steps = (s.k + group - 1) / group;
    panel_bytes = steps * units * unit_columns * group;
    columns_bytes = round_up(panels * units * unit_columns * 4);
    rows_bytes = round_up(s.m * 4);
    pointers_bytes = round_up(s.m * 8);
    raw_bytes = raw_rows * units * unit_columns * 4;
    wide_row_bytes = kernels->widen == nullptr ? 0 : round_up((s.k + 16) * 2);
    wide_bytes = wide_row_bytes * std::min(s.m, wide_rows);
  }
  // of one product: b packed, a bias a column, a bias a row
  int64_t product_bytes() const { return panels * panel_bytes + columns_bytes + rows_bytes; }
  int64_t slot_bytes() const { return pointers_bytes + raw_bytes + wide_bytes; }
};

bool has_bytes(const View& v) { return v.type == Type::u8 || v.type == Type::s8; }

// b and what its zero point and a's contribute: with a' = a - shift_a, b' = b - shift_b stored in 8 bits,
// sum (a - za)(b - zb) = sum a' b' - zb' sum a' - za' sum b' + k za' zb'.
void pack_right(const Plan& plan, const MatmulShape& s, const View& a, const View& b, int64_t index, int8_t* to) {
  const bool flip_a = (a.type == Type::s8) != plan.kernels->signed_left;
  const int32_t shift_a = !flip_a ? 0 : a.type == Type::s8 ? -128 : 128;
  const int32_t za = a.grid.zero_point - shift_a;
  const uint8_t flip_b = b.type == Type::u8 ? 0x80 : 0;
  const int32_t zb = b.grid.zero_point - (flip_b != 0 ? 128 : 0);
  const int32_t width = plan.units * unit_columns, group = plan.kernels->group();
  const auto* right = static_cast<const uint8_t*>(b.data) + s.b_index[index] * s.k * s.n;
  auto* columns = reinterpret_cast<int32_t*>(to + plan.panels * plan.panel_bytes);
  std::memset(to, 0, static_cast<size_t>(plan.panels * plan.panel_bytes + plan.columns_bytes));
  for (int64_t p = 0; p < plan.panels; ++p) {
    int8_t* panel = to + p * plan.panel_bytes;
    const int64_t first = p * width, count = std::min<int64_t>(width, s.n - first);
    for (int64_t c = 0; c < count; ++c) {
      int32_t sum = 0;
      const uint8_t* from = right + (s.b_transposed ? (first + c) * s.k : first + c);
      const int64_t step = s.b_transposed ? 1 : s.n;
      for (int64_t k = 0; k < s.k; ++k) {
        const auto code = static_cast<int8_t>(from[k * step] ^ flip_b);
        panel[(k / group * width + c) * group + k % group] = code;
        sum += code;
      }
      columns[first + c] = static_cast<int32_t>(s.k) * za * zb - za * sum;
    }
  }
  auto* rows = reinterpret_cast<int32_t*>(to + plan.panels * plan.panel_bytes + plan.columns_bytes);
  const auto* left = static_cast<const uint8_t*>(a.data) + s.a_index[index] * s.m * s.k;
  for (int64_t r = 0; r < s.m && zb != 0; ++r) {
    int32_t sum = 0;
    for (int64_t k = 0; k < s.k; ++k) {
      const uint8_t code = left[r * s.k + k];
      sum += a.type == Type::s8 ? static_cast<int8_t>(code) : code;
    }
    rows[r] = -zb * (sum - static_cast<int32_t>(s.k) * shift_a);
  }
}

struct Product {
  const Plan& plan;
  const MatmulShape& shape;
  const View& a;
  const View& b;
  const View& y;
  const ByteEpilogue* bytes;  // null: the kernels do not make the codes
  float multiplier;

  template <class Acc>
  int32_t code(Acc acc) const {
    if (!a.grid.wide && !b.grid.wide && !y.grid.wide) return requantize_onnx(acc, multiplier, y.grid);
    const double real = static_cast<double>(b.grid.scale) * static_cast<double>(a.grid.scale);
    return requantize_real(acc, real, y.grid);
  }
};

// Rows [begin, end) of product `index`.
void multiply(const Product& p, int64_t index, int64_t begin, int64_t end, const int8_t* packed, int8_t* slot) {
  const MatmulShape& s = p.shape;
  const Plan& plan = p.plan;
  const int32_t width = plan.units * unit_columns;
  const auto* left = static_cast<const uint8_t*>(p.a.data) + s.a_index[index] * s.m * s.k;
  auto** pointers = reinterpret_cast<const uint8_t**>(slot);
  auto* raw = reinterpret_cast<int32_t*>(slot + plan.pointers_bytes);
  const uint8_t left_flip = (p.a.type == Type::s8) == plan.kernels->signed_left ? 0 : 0x80;
  for (int64_t r = begin; r < end; ++r) {
    pointers[r] = left + r * s.k;
    if (plan.kernels->widen == nullptr) continue;
    int8_t* words = slot + plan.pointers_bytes + plan.raw_bytes + (r - begin) * plan.wide_row_bytes;
    plan.kernels->widen(pointers[r], left_flip, s.k, reinterpret_cast<int16_t*>(words));
    pointers[r] = reinterpret_cast<const uint8_t*>(words);
  }
  const auto* columns = reinterpret_cast<const int32_t*>(packed + plan.panels * plan.panel_bytes);
  const auto* rows = reinterpret_cast<const int32_t*>(packed + plan.panels * plan.panel_bytes + plan.columns_bytes);
  const bool has_row_bias = p.b.grid.zero_point != (p.b.type == Type::u8 ? 128 : 0);
  const int32_t tap = 0;
  GemmBlock g{};
  g.left_flip = plan.kernels->widen == nullptr ? left_flip : 0;
  g.taps = 1;
  g.depth = static_cast<int32_t>(plan.steps);
  g.right_taps = &tap;
  g.epilogue = p.bytes;
  g.y_stride = s.n;
  const int64_t step = p.bytes != nullptr ? end - begin : raw_rows;
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    g.right = packed + panel * plan.panel_bytes;
    g.bias = columns + panel * width;
    g.columns = static_cast<int32_t>(std::min<int64_t>(width, s.n - panel * width));
    for (int64_t r = begin; r < end; r += step) {
      const int64_t at = (index * s.m + r) * s.n + panel * width;
      g.left = pointers + r;
      g.rows = static_cast<int32_t>(std::min(step, end - r));
      g.row_bias = has_row_bias ? rows + r : nullptr;
      g.raw = p.bytes != nullptr ? nullptr : raw;
      g.y = static_cast<uint8_t*>(p.y.data) + at;
      plan.kernels->gemm(g, plan.units);
      if (p.bytes != nullptr) continue;
      for (int32_t i = 0; i < g.rows; ++i) {
        for (int32_t c = 0; c < g.columns; ++c) {
          store_code(p.y.data, p.y.type, at + int64_t{i} * s.n + c, p.code(raw[i * width + c]));
        }
      }
    }
  }
}

// More than 8 bits: exact 64-bit sums of one row, element by element.
void multiply_wide(const Product& p, int64_t index, int64_t row) {
  const MatmulShape& s = p.shape;
  const int64_t left = (s.a_index[index] * s.m + row) * s.k, right = s.b_index[index] * s.k * s.n;
  for (int64_t n = 0; n < s.n; ++n) {
    int64_t acc = 0;
    for (int64_t k = 0; k < s.k; ++k) {
      const int64_t a = load_code(p.a.data, p.a.type, left + k) - p.a.grid.zero_point;
      const int64_t at = right + (s.b_transposed ? n * s.k + k : k * s.n + n);
      acc += a * (load_code(p.b.data, p.b.type, at) - p.b.grid.zero_point);
    }
    store_code(p.y.data, p.y.type, (index * s.m + row) * s.n + n, p.code(acc));
  }
}

}  // namespace

int64_t matmul_scratch(const char* isa, const MatmulShape& shape, int32_t threads) {
  const Plan plan(isa, shape);
  return plan.product_bytes() * shape.batch + plan.slot_bytes() * threads;
}

void run_matmul(const char* isa, const Threads& threads, const MatmulShape& shape, const View& a, const View& b,
                const View& y, void* scratch) {
  const Plan plan(isa, shape);
  const int64_t parts = threads.count, rows = shape.batch * shape.m;
  Product product{plan, shape, a, b, y, nullptr, a.grid.scale * b.grid.scale / y.grid.scale};
  if (!has_bytes(a) || !has_bytes(b)) {
    return run_parts(threads, parts, [&](int64_t part) {
      for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
        multiply_wide(product, r / shape.m, r % shape.m);
      }
    });
  }

  Epilogue epilogue;
  epilogue.wide = a.grid.wide || b.grid.wide || y.grid.wide;
  epilogue.y = y.grid;
  ByteEpilogue bytes = byte_epilogue(epilogue, y.type);
  // as of a list of multipliers, which would have to be allocated
  bytes.bounded = !(product.multiplier < 0.99f);
  float multiplier[max_units * unit_columns];
  std::fill_n(multiplier, max_units * unit_columns, product.multiplier);
  bytes.multiplier = multiplier;
  if (has_byte_epilogue(epilogue, y.type)) product.bytes = &bytes;

  auto* packed = static_cast<int8_t*>(scratch);
  int8_t* slots = packed + plan.product_bytes() * shape.batch;
  run_parts(threads, parts, [&](int64_t part) {
    for (int64_t i = shape.batch * part / parts; i < shape.batch * (part + 1) / parts; ++i) {
      pack_right(plan, shape, a, b, i, packed + i * plan.product_bytes());
    }
  });
  run_parts(threads, parts, [&](int64_t part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    for (int64_t r = begin; r < end;) {
      const int64_t index = r / shape.m, first = r % shape.m;
      int64_t last = std::min(shape.m, first + end - r);
      if (plan.wide_bytes != 0) last = std::min(last, first + wide_rows);
      multiply(product, index, first, last, packed + index * plan.product_bytes(), slots + part * plan.slot_bytes());
      r += last - first;
    }
  });
}

}  // namespace qat
