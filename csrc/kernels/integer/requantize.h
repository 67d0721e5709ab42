// From accumulators to codes one by one, for everything that the vector kernels do not do themselves: the formulas of
// qat/integer/kernels/requantize.py, qat/numerics.py and qat/integer/kernels/elementwise.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv.h"

namespace qat {

inline int32_t clamped_code(float steps, const Grid& y) {
  const float low = static_cast<float>(y.qmin - y.zero_point), high = static_cast<float>(y.qmax - y.zero_point);
  return static_cast<int32_t>(std::nearbyint(std::min(std::max(steps, low), high))) + y.zero_point;
}

// nan becomes qmin.
inline int32_t quantize_code(float real, const Grid& y) {
  const float steps = real / y.scale;
  return std::isnan(steps) ? y.qmin : clamped_code(steps, y);
}

template <class Acc>
int32_t requantize_onnx(Acc acc, float multiplier, const Grid& y) {
  return clamped_code(static_cast<float>(acc) * multiplier, y);
}

template <class Acc>
int32_t requantize_real(Acc acc, double real, const Grid& y) {
  return quantize_code(static_cast<float>(static_cast<double>(acc) * real), y);
}

inline int32_t requantize_fixed(int64_t acc, int32_t multiplier, int32_t shift, bool double_rounding, const Grid& y) {
  int64_t scaled;
  if (double_rounding) {
    const int32_t left = std::max(shift, 0), right = std::max(-shift, 0);
    const int64_t shifted = std::min<int64_t>(std::max<int64_t>(acc * (int64_t{1} << left), INT32_MIN), INT32_MAX);
    const int64_t product = shifted * multiplier;
    const int64_t nudge = product >= 0 ? int64_t{1} << 30 : 1 - (int64_t{1} << 30);
    const int64_t rounded = (product + nudge) / (int64_t{1} << 31);
    const int64_t mask = (int64_t{1} << right) - 1;
    const int64_t threshold = (mask >> 1) + (rounded < 0 ? 1 : 0);
    scaled = (rounded >> right) + ((rounded & mask) > threshold ? 1 : 0);
  } else {
    const int32_t total = 31 - shift;
    scaled = (acc * multiplier + (int64_t{1} << (total - 1))) >> total;
  }
  return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(scaled + y.zero_point, y.qmin), y.qmax));
}

// QLinearAdd of two codes: fma(left, left_ratio, fma(right, right_ratio, fixed)).
struct Sum {
  float left_ratio, right_ratio, fixed;
  Grid y;

  Sum(const Grid& left, const Grid& right, const Grid& sum)
      : left_ratio(left.scale / sum.scale), right_ratio(right.scale / sum.scale), y(sum) {
    const float zero = right_ratio * static_cast<float>(right.zero_point);
    fixed = static_cast<float>(sum.zero_point) - std::fma(left_ratio, static_cast<float>(left.zero_point), zero);
  }

  int32_t operator()(int32_t left, int32_t right) const {
    const float partial = std::fma(static_cast<float>(right), right_ratio, fixed);
    const float total = std::fma(static_cast<float>(left), left_ratio, partial);
    const float low = static_cast<float>(y.qmin), high = static_cast<float>(y.qmax);
    return static_cast<int32_t>(std::nearbyint(std::min(std::max(total, low), high)));
  }
};

inline int32_t load_code(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::u8: return static_cast<const uint8_t*>(data)[i];
    case Type::s8: return static_cast<const int8_t*>(data)[i];
    case Type::u16: return static_cast<const uint16_t*>(data)[i];
    case Type::s16: return static_cast<const int16_t*>(data)[i];
    default: return static_cast<const int32_t*>(data)[i];
  }
}

inline void store_code(void* data, Type type, int64_t i, int32_t code) {
  switch (type) {
    case Type::u8:
    case Type::s8: static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(code); return;
    case Type::u16:
    case Type::s16: static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(code); return;
    default: static_cast<int32_t*>(data)[i] = code; return;
  }
}

inline int64_t type_bytes(Type type) {
  return type == Type::u8 || type == Type::s8 ? 1 : type == Type::u16 || type == Type::s16 ? 2 : 4;
}

// Whether the vector kernels can make the codes.
inline bool has_byte_epilogue(const Epilogue& e, Type y) {
  return e.profile == Profile::onnx && !e.wide && (y == Type::u8 || y == Type::s8);
}

// `count` accumulators of channels `channel`, ... to elements `at`, ... of y.
template <class Acc>
void finish(const Epilogue& e, const Acc* acc, int32_t channel, int32_t count, void* y, Type type, int64_t at,
            const void* residual) {
  const Sum sum = e.add ? (e.residual_first ? Sum(e.residual, e.y, e.sum) : Sum(e.y, e.residual, e.sum))
                        : Sum(e.y, e.y, e.y);
  for (int32_t i = 0; i < count; ++i) {
    const auto c = static_cast<size_t>(channel + i);
    int32_t code;
    if (e.wide) {
      code = requantize_real(acc[i], e.real[c], e.y);
    } else if (e.profile == Profile::onnx) {
      code = requantize_onnx(acc[i], e.multiplier[c], e.y);
    } else {
      code = requantize_fixed(acc[i], e.fixed[c], e.shift[c], e.profile == Profile::tflite_double, e.y);
    }
    if (e.add) {
      const int32_t other = load_code(residual, e.residual_type, at + i);
      code = e.residual_first ? sum(other, code) : sum(code, other);
    } else if (e.table != nullptr) {
      code = e.table[code - e.y.qmin];
    }
    store_code(y, type, at + i, code);
  }
}

// What the vector kernels need, for `table` the codes less qmin, all but the multipliers.
inline ByteEpilogue byte_epilogue(const Epilogue& e, Type y) {
  ByteEpilogue b{};
  b.low = static_cast<float>(e.y.qmin - e.y.zero_point);
  b.high = static_cast<float>(e.y.qmax - e.y.zero_point);
  // no accumulator times less than 0.99 leaves int32
  b.bounded = std::any_of(e.multiplier.begin(), e.multiplier.end(), [](float m) { return !(m < 0.99f); });
  const Grid& last = e.add ? e.sum : e.y;
  const int32_t shift = e.table != nullptr ? -e.y.qmin : y == Type::s8 ? 128 : 0;
  b.codes.zero = static_cast<int16_t>((e.add ? 0 : e.y.zero_point) + shift);
  b.codes.low = static_cast<uint8_t>(last.qmin + shift);
  b.codes.high = static_cast<uint8_t>(last.qmax + shift);
  b.codes.flip = e.table == nullptr && y == Type::s8 ? 0x80 : 0;
  if (e.add) {
    const Sum sum = e.residual_first ? Sum(e.residual, e.y, e.sum) : Sum(e.y, e.residual, e.sum);
    b.add = true;
    b.residual_first = e.residual_first;
    b.residual_signed = e.residual_type == Type::s8;
    b.zero_point = static_cast<float>(e.y.zero_point);
    b.own_ratio = e.residual_first ? sum.right_ratio : sum.left_ratio;
    b.residual_ratio = e.residual_first ? sum.left_ratio : sum.right_ratio;
    b.fixed = sum.fixed;
    b.sum_high = static_cast<float>(e.sum.qmax);
  }
  return b;
}

}  // namespace qat
