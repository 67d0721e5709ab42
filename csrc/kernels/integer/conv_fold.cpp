#include <algorithm>
#include <cstring>

#include "conv_layer.h"

namespace qat {

void fold_rows(const ConvLayer& l, const uint8_t* x, uint8_t* to, int64_t begin, int64_t end) {
  const ConvShape& s = l.shape;
  const int64_t c = l.weights->inputs;
  const auto zero = static_cast<uint8_t>(l.x_grid.zero_point);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* from = x + row * s.in_w * c;
    uint8_t* out = to + row * l.row_bytes;
    if (s.dilation_w == 1) {
      const int64_t width = l.row_bytes / c;
      const int64_t left = std::min<int64_t>(s.pad_left, width);
      const int64_t inside = std::max<int64_t>(std::min<int64_t>(s.in_w, width - left), 0);
      std::memset(out, zero, static_cast<size_t>(left * c));
      std::memcpy(out + left * c, from, static_cast<size_t>(inside * c));
      std::memset(out + (left + inside) * c, zero, static_cast<size_t>((width - left - inside) * c));
      continue;
    }
    for (int32_t ox = 0; ox < s.out_w; ++ox) {
      for (int32_t k = 0; k < l.weights->kernel_w; ++k, out += c) {
        const int32_t ix = source(ox, k, s.stride_w, s.pad_left, s.dilation_w, s.in_w, false);
        if (ix < 0) {
          std::memset(out, zero, static_cast<size_t>(c));
        } else {
          std::memcpy(out, from + ix * c, static_cast<size_t>(c));
        }
      }
    }
  }
}

}  // namespace qat
