// Nested loops over tensors of different strides, simplified: dimensions of size 1 are gone, and neighbours that all
// operands store as one are one.
#pragma once

#include "view.h"

namespace qat {

constexpr int max_operands = 3;

struct Nest {
  int32_t rank = 0;
  int32_t operands = 0;
  int64_t sizes[max_rank];
  int64_t strides[max_operands][max_rank];  // in elements; 0 repeats, negative goes backwards

  int64_t count(int32_t dims) const {
    int64_t n = 1;
    for (int32_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }

  // Appends an inner dimension.
  void push(int64_t size, const int64_t* each) {
    if (size == 1) return;
    bool merges = rank > 0;
    for (int32_t k = 0; k < operands && merges; ++k) merges = strides[k][rank - 1] == each[k] * size;
    if (merges) {
      sizes[rank - 1] *= size;
    } else {
      sizes[rank++] = size;
    }
    for (int32_t k = 0; k < operands; ++k) strides[k][rank - 1] = each[k];
  }
};

// A position of the outer `dims` dimensions.
class Position {
 public:
  Position(const Nest& nest, int32_t dims, int64_t index) : nest_(nest), dims_(dims) {
    for (int32_t k = 0; k < nest.operands; ++k) offsets[k] = 0;
    for (int32_t d = dims - 1; d >= 0; --d) {
      at_[d] = index % nest.sizes[d];
      index /= nest.sizes[d];
      for (int32_t k = 0; k < nest.operands; ++k) offsets[k] += at_[d] * nest.strides[k][d];
    }
  }

  void next() {
    for (int32_t d = dims_ - 1; d >= 0; --d) {
      for (int32_t k = 0; k < nest_.operands; ++k) offsets[k] += nest_.strides[k][d];
      if (++at_[d] < nest_.sizes[d]) return;
      for (int32_t k = 0; k < nest_.operands; ++k) offsets[k] -= at_[d] * nest_.strides[k][d];
      at_[d] = 0;
    }
  }

  int64_t offsets[max_operands];

 private:
  const Nest& nest_;
  int32_t dims_;
  int64_t at_[max_rank];
};

// Strides of a dense tensor.
inline void dense_strides(const View& view, int64_t* strides) {
  int64_t stride = 1;
  for (int32_t d = view.rank - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= view.sizes[d];
  }
}

// x and y = x permuted; `perm` may be null.
inline Nest permuted(const View& x, const View& y, const int64_t* perm) {
  int64_t from[max_rank], to[max_rank];
  dense_strides(x, from);
  dense_strides(y, to);
  Nest nest;
  nest.operands = 2;
  for (int32_t d = 0; d < y.rank; ++d) {
    const int64_t each[] = {from[perm == nullptr ? d : perm[d]], to[d]};
    nest.push(y.sizes[d], each);
  }
  return nest;
}

// What a and b, broadcast as numpy's, and y are read and written at.
inline Nest broadcast(const View& a, const View& b, const View& y) {
  int64_t of_a[max_rank], of_b[max_rank], of_y[max_rank];
  dense_strides(a, of_a);
  dense_strides(b, of_b);
  dense_strides(y, of_y);
  const auto stride = [&](const View& view, const int64_t* strides, int32_t d) -> int64_t {
    const int32_t own = d - (y.rank - view.rank);
    return own < 0 || view.sizes[own] == 1 ? 0 : strides[own];
  };
  Nest nest;
  nest.operands = 3;
  for (int32_t d = 0; d < y.rank; ++d) {
    const int64_t each[] = {stride(a, of_a, d), stride(b, of_b, d), of_y[d]};
    nest.push(y.sizes[d], each);
  }
  return nest;
}

}  // namespace qat
