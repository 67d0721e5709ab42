// Whether the operators of a plan are what the kernels can run without looking at sizes, types or indices themselves:
// nothing is read or written out of bounds, and nothing overflows, whatever the file said.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "../kernels/integer/conv.h"
#include "../kernels/integer/pool.h"
#include "error.h"
#include "plan.h"

namespace qat {

// Of one tensor, as the convolutions index bytes and pixels with 32 bits.
constexpr int64_t max_bytes = INT32_MAX;
// Of a window's sizes, strides, pads and dilations.
constexpr int64_t max_window = 32767;

// All arrays with the sizes that they have for a batch size; data is null but of constants. Throws Error where a size
// is not positive or a tensor too large.
std::vector<View> resolve_sizes(const Plan& plan, int64_t batch);

// Throws Error, which names the operator.
void check_plan(const Plan& plan, const std::vector<View>& arrays);

// Whether a grid of codes makes sense. The zero point may lie outside of a range that a clamp has made narrower.
bool is_grid(Type type, const Grid& grid);

// What the integers of an operator say, for sizes that were checked.
ConvShape conv_shape(const Operator& op, const View& x, const View& y);
Grid conv_own_grid(const Operator& op);
Type conv_own_type(const Operator& op);
PoolShape pool_shape(const Operator& op);

// Inputs of a convolution.
enum ConvInput : size_t { conv_x, conv_weight, conv_zero_points, conv_scales, conv_bias, conv_multipliers, conv_shifts,
                          conv_residual, conv_table };

// An operator with its operands, and what all checks have in common.
class Checker {
 public:
  Checker(const Plan& plan, const std::vector<View>& arrays, const Operator& op)
      : plan(plan), op(op), y(arrays[static_cast<size_t>(op.output)]), arrays_(arrays) {}

  const View& x(size_t input) const { return arrays_[static_cast<size_t>(op.inputs[input])]; }
  bool has(size_t input) const { return op.has(input); }

  void require(bool condition, const char* cause) const {
    if (!condition) fail(cause);
  }
  [[noreturn]] void fail(const std::string& cause) const;

  // Numbers of inputs, of which the first `needed` must be there, integers and floats.
  void expect(size_t inputs, size_t needed, size_t ints, size_t floats) const;
  // An integer within bounds.
  int64_t integer(size_t index, int64_t low, int64_t high, const char* what) const;
  // An operand of codes with a grid that makes sense.
  void codes(const View& view, const char* what) const;
  // A constant with `count` elements.
  void constant(size_t input, Type type, int64_t count, const char* what) const;
  // A constant of indices below `limit`.
  void indices(size_t input, int64_t count, int64_t limit, const char* what) const;
  // A constant of positive, finite numbers.
  void scales(size_t input, int64_t count) const;
  // Type, scale and zero point are equal, so that codes can be moved as they are.
  void same_codes(const View& a) const;
  void same_sizes(const View& a) const;
  // `ints` from `first` on are a permutation of the dimensions of x(0), which gives y.
  void permutation(size_t first) const;
  // Sizes of x broadcast to y, the last `skip` dimensions of both aside.
  void broadcasts(const View& a, int32_t skip) const;

  const Plan& plan;
  const Operator& op;
  const View& y;

 private:
  const std::vector<View>& arrays_;
};

void check_conv(const Checker& c);
void check_matmul(const Checker& c);
void check_window(const Checker& c);
void check_resize(const Checker& c);
void check_movement(const Checker& c);

// The product of values that are not negative; throws through `c` above 2^40.
int64_t checked_product(const Checker& c, std::initializer_list<int64_t> values);

}  // namespace qat
