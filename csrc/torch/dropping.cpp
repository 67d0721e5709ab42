// Registration of the numbers by which QDrop chooses elements.
#include "../kernels/dropping.h"

#include "tensors.h"

namespace {

using namespace qat::ops;

// float32, in the order of memory of `like`.
Tensor drop_numbers(Tensor like, Tensor seed) {
  check_cpu(like, "like");
  check(like.scalar_type() == ScalarType::Float, "like is not float32; give a float32 tensor");
  const std::optional<qat::Drop> drop = drop_of(seed, 1.0);
  Tensor numbers = torch::stable::empty_like(like);
  qat::place_numbers(kernels(), parallel, drop->seed, numbers.mutable_data_ptr<float>(), numbers.numel());
  return numbers;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) { m.def("drop_numbers(Tensor like, Tensor seed) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) { m.impl("drop_numbers", TORCH_BOX(&drop_numbers)); }
