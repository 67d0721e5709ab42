// What the registrations of the CPU's operators share: its kernels and threads, and tensors of its memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "operands.h"

namespace qat::ops {

// The instruction set in use (ops.cpp).
const qat::Kernels& kernels();

inline void parallel(int64_t begin, int64_t end, int64_t grain, qat::ParallelTask task, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { task(b, e, context); });
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), std::string(name) + " is not on the CPU; give CPU tensors");
}

inline void check_values(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  check_number(tensor, name);
}

inline Tensor new_cpu(std::vector<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

inline std::vector<float> grid_values(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
  check_cpu(given, name);
  check_count(given, name, count, x);
  const Tensor values = torch::stable::contiguous(given);
  std::vector<float> out(static_cast<size_t>(count));
  const void* data = values.const_data_ptr();
  switch (values.scalar_type()) {
    case ScalarType::Int: std::copy_n(static_cast<const int32_t*>(data), count, out.data()); break;
    case ScalarType::Long: std::copy_n(static_cast<const int64_t*>(data), count, out.data()); break;
    default: std::copy_n(static_cast<const float*>(data), count, out.data());
  }
  return out;
}

inline ExtremaTensors new_extrema(const Tensor& x, int64_t axis) {
  const std::vector<int64_t> sizes = axis == -1 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
  ExtremaTensors made{new_cpu(sizes, ScalarType::Float), new_cpu(sizes, ScalarType::Float),
                      new_cpu({}, ScalarType::Long)};
  std::fill_n(made.low.mutable_data_ptr<float>(), made.low.numel(), std::numeric_limits<float>::infinity());
  std::fill_n(made.high.mutable_data_ptr<float>(), made.high.numel(), -std::numeric_limits<float>::infinity());
  *made.nonfinite.mutable_data_ptr<int64_t>() = 0;
  return made;
}

inline void check_state(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  check_cpu(tensor, name);
  check_buffer(tensor, name, type, count);
}

}  // namespace qat::ops
