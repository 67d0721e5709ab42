// The 8-bit kernels one layer at a time, for tests and benchmarks; networks run them through csrc/runtime.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/integer/conv.h"
#include "../kernels/integer/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void run_on_torch(void*, int64_t begin, int64_t end, int64_t grain, qat::Task task, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { task(b, e, context); });
}

qat::Threads threads() {
  return {run_on_torch, nullptr, static_cast<int32_t>(torch::stable::get_num_threads())};
}

void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("qat: ") + message);
}

qat::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return qat::Type::u8;
    case ScalarType::Char: return qat::Type::s8;
    case ScalarType::UInt16: return qat::Type::u16;
    case ScalarType::Short: return qat::Type::s16;
    default: throw std::runtime_error("qat: codes of this type have no kernel; give 8 or 16 bits");
  }
}

template <class T>
std::vector<T> values(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {};
  const T* from = static_cast<const T*>(t->const_data_ptr());
  return {from, from + t->numel()};
}

const void* data_of(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

void* aligned(std::vector<uint8_t>& bytes) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
}

// Reads plain numbers in the order in which they are named.
class Numbers {
 public:
  Numbers(const std::vector<int64_t>& ints, const std::vector<double>& floats) : ints_(ints), floats_(floats) {}
  int32_t next() {
    check(at_ < ints_.size(), "too few integers");
    return static_cast<int32_t>(ints_[at_++]);
  }
  qat::Grid grid() {
    check(at_float_ < floats_.size(), "too few scales");
    qat::Grid g{};
    g.scale = static_cast<float>(floats_[at_float_++]);
    g.zero_point = next();
    g.qmin = next();
    g.qmax = next();
    g.wide = next() != 0;
    return g;
  }

 private:
  const std::vector<int64_t>& ints_;
  const std::vector<double>& floats_;
  size_t at_ = 0, at_float_ = 0;
};

// ints: batch, in_h, in_w, out_h, out_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, transposed, outputs,
// inputs, groups, kernel_h, kernel_w, four_bits, profile, wide, residual_first; then zero point, qmin, qmax, wide of x, y,
// residual, sum; floats: their scales.
// Returns the seconds that `repeats` runs take.
double int8_conv(std::string isa, Tensor x, Tensor weight, std::optional<Tensor> weight_zero,
               std::optional<Tensor> multiplier, std::optional<Tensor> real, std::optional<Tensor> fixed,
               std::optional<Tensor> shift, std::optional<Tensor> bias, std::optional<Tensor> residual,
               std::optional<Tensor> table, std::vector<int64_t> ints, std::vector<double> floats, Tensor y,
               int64_t repeats) {
  check(qat::find_integer_isa(isa.c_str()) != nullptr, "unknown instruction set, or one that this processor lacks");
  Numbers numbers(ints, floats);
  qat::ConvShape shape{};
  shape.batch = numbers.next();
  for (int32_t* field : {&shape.in_h, &shape.in_w, &shape.out_h, &shape.out_w, &shape.stride_h, &shape.stride_w,
                         &shape.pad_top, &shape.pad_left, &shape.dilation_h, &shape.dilation_w}) {
    *field = numbers.next();
  }
  shape.transposed = numbers.next() != 0;
  qat::Weights weights{};
  for (int32_t* field : {&weights.outputs, &weights.inputs, &weights.groups, &weights.kernel_h, &weights.kernel_w}) {
    *field = numbers.next();
  }
  weights.data = weight.const_data_ptr();
  weights.type = numbers.next() != 0 ? qat::Type::s4 : qat::Type::s8;
  weights.zero_points = static_cast<const int32_t*>(data_of(weight_zero));
  qat::Epilogue epilogue;
  epilogue.profile = static_cast<qat::Profile>(numbers.next());
  epilogue.wide = numbers.next() != 0;
  epilogue.residual_first = numbers.next() != 0;
  epilogue.multiplier = values<float>(multiplier);
  epilogue.real = values<double>(real);
  epilogue.fixed = values<int32_t>(fixed);
  epilogue.shift = values<int32_t>(shift);
  epilogue.bias = values<int32_t>(bias);
  epilogue.table = static_cast<const uint8_t*>(data_of(table));
  const qat::Grid x_grid = numbers.grid();
  epilogue.y = numbers.grid();
  epilogue.residual = numbers.grid();
  epilogue.sum = numbers.grid();
  epilogue.add = residual.has_value();
  if (epilogue.add) epilogue.residual_type = type_of(*residual);

  const auto packed = qat::pack_weights(isa.c_str(), weights, type_of(x), shape.transposed);
  const auto layer = qat::prepare_conv(packed, shape, type_of(x), x_grid, type_of(y), epilogue);
  const qat::Threads pool = threads();
  std::vector<uint8_t> scratch(static_cast<size_t>(qat::conv_scratch(*layer, pool.count)) + 64);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) {
    qat::run_conv(*layer, pool, x.const_data_ptr(), y.mutable_data_ptr(), data_of(residual), aligned(scratch));
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

qat::View view_of(const Tensor& t, const qat::Grid& grid) {
  qat::View view{};
  view.data = const_cast<void*>(t.const_data_ptr());
  view.type = type_of(t);
  view.rank = static_cast<int32_t>(t.dim());
  for (int32_t d = 0; d < view.rank; ++d) view.sizes[d] = t.size(d);
  view.grid = grid;
  return view;
}

// a (batch, m, k), b (batch, k, n) or (batch, n, k), y (batch, m, n); ints: zero point, qmin, qmax, wide of a, b, y.
void int8_matmul(std::string isa, Tensor a, Tensor b, bool b_transposed, std::vector<int64_t> ints,
                 std::vector<double> floats, Tensor y) {
  check(qat::find_integer_isa(isa.c_str()) != nullptr, "unknown instruction set, or one that this processor lacks");
  Numbers numbers(ints, floats);
  const qat::View left = view_of(a, numbers.grid());
  const qat::View right = view_of(b, numbers.grid());
  const qat::View out = view_of(y, numbers.grid());
  std::vector<int64_t> index(static_cast<size_t>(y.size(0)));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  const qat::MatmulShape shape{y.size(0), y.size(1), y.size(2), a.size(2), b_transposed, index.data(), index.data()};
  const qat::Threads pool = threads();
  std::vector<uint8_t> scratch(static_cast<size_t>(qat::matmul_scratch(isa.c_str(), shape, pool.count)) + 64);
  qat::run_matmul(isa.c_str(), pool, shape, left, right, out, aligned(scratch));
}

// Products that `steps` rounds of the multiply-accumulate instruction make on registers only, on one thread.
int64_t int8_peak(std::string isa, int64_t steps) {
  const qat::Int8Kernels* kernels = qat::find_int8_kernels(isa.c_str());
  check(kernels != nullptr, "unknown instruction set, or one that this processor lacks");
  return kernels->peak(steps);
}

std::string int8_isa(std::string isa) {
  const char* found = qat::find_integer_isa(isa.c_str());
  return found == nullptr ? "" : found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("_int8_conv(str isa, Tensor x, Tensor weight, Tensor? weight_zero, Tensor? multiplier, Tensor? real, "
        "Tensor? fixed, Tensor? shift, Tensor? bias, Tensor? residual, Tensor? table, int[] ints, float[] floats, "
        "Tensor(a!) y, int repeats=1) -> float");
  m.def("_int8_matmul(str isa, Tensor a, Tensor b, bool b_transposed, int[] ints, float[] floats, Tensor(a!) y) "
        "-> ()");
  m.def("_int8_peak(str isa, int steps) -> int");
  m.def("_int8_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("_int8_conv", TORCH_BOX(&int8_conv));
  m.impl("_int8_matmul", TORCH_BOX(&int8_matmul));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_int8_peak", TORCH_BOX(&int8_peak));
  m.impl("_int8_isa", TORCH_BOX(&int8_isa));
}
