// Products and convolutions of codes on the GPU. Their schemas exist only where this file was compiled.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda.h"

namespace {

using namespace qat::ops;
using namespace qat::ops::gpu;
using qat::cuda::ConvShape;
using qat::cuda::Requantize;

constexpr int64_t most_blocks_y = 65535;

// Codes of a tensor and a number for messages.
bool is_signed(const Tensor& codes, const char* name) {
  const ScalarType type = codes.scalar_type();
  check(type == ScalarType::Byte || type == ScalarType::Char, std::string(name) + " is neither uint8 nor int8");
  return type == ScalarType::Char;
}

void check_code(int64_t code, bool code_signed, const char* name) {
  const int64_t low = code_signed ? -128 : 0;
  check(low <= code && code <= low + 255, std::string(name) + " " + std::to_string(code) + " is no code of " +
                                              (code_signed ? "int8" : "uint8") + "; give one from " +
                                              std::to_string(low) + " to " + std::to_string(low + 255));
}

void check_range(int64_t qmin, int64_t qmax, bool code_signed, const char* name) {
  check_code(qmin, code_signed, name);
  check_code(qmax, code_signed, name);
  check(qmin < qmax, std::string(name) + " [" + std::to_string(qmin) + ", " + std::to_string(qmax) + "] is empty");
}

struct Operands {
  const Tensor &x, &weight, &multiplier;
  const std::optional<Tensor>&bias, &residual;
};

void run(const Operands& t, const Device& device, const ConvShape& shape, int64_t x_zero_point, const Requantize& r,
         Tensor& y) {
  check_cuda(t.weight, "weight", device.index);
  check_type(t.weight, "weight", ScalarType::Char, "int8");
  const bool x_signed = is_signed(t.x, "x");
  check_code(x_zero_point, x_signed, "x_zero_point");
  const int64_t channels = int64_t{shape.groups} * shape.outputs;
  check_cuda(t.multiplier, "multiplier", device.index);
  check_type(t.multiplier, "multiplier", ScalarType::Float, "float32");
  check(t.multiplier.numel() == channels && t.multiplier.is_contiguous(),
        "multiplier has not one contiguous value for each of " + std::to_string(channels) + " output channels");
  if (t.bias) {
    check_cuda(*t.bias, "bias", device.index);
    check_type(*t.bias, "bias", ScalarType::Int, "int32");
    check(t.bias->numel() == channels && t.bias->is_contiguous(),
          "bias has not one contiguous value for each of " + std::to_string(channels) + " output channels");
  }
  if (t.residual) {
    check_cuda(*t.residual, "residual", device.index);
    check(t.residual->is_contiguous() && shape_of(*t.residual) == shape_of(y),
          "residual is no contiguous tensor of the result's shape " + shape_of(y));
  }
  check(shape.groups <= most_blocks_y && (shape.outputs + 63) / 64 <= most_blocks_y,
        std::to_string(channels) + " output channels are too many for one launch");
  if (y.numel() == 0) return;
  const Tensor folded = torch::stable::new_empty(t.multiplier, std::vector<int64_t>{channels}, ScalarType::Int);
  check_launch(qat::cuda::fold_zero_point(t.weight.const_data_ptr<int8_t>(),
                                          t.bias ? t.bias->const_data_ptr<int32_t>() : nullptr,
                                          static_cast<int32_t>(x_zero_point), channels, shape.depth(),
                                          folded.mutable_data_ptr<int32_t>(), device.stream),
               "int8: the fold of the zero point");
  check_launch(qat::cuda::int8_conv(t.x.const_data_ptr(), x_signed, static_cast<int32_t>(x_zero_point),
                                    t.weight.const_data_ptr<int8_t>(), folded.const_data_ptr<int32_t>(),
                                    t.multiplier.const_data_ptr<float>(), shape, r,
                                    t.residual ? t.residual->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                                    device.stream),
               "int8 product");
}

Requantize requantization(int64_t zero_point, int64_t qmin, int64_t qmax, bool y_signed,
                          const std::optional<Tensor>& residual, double left_ratio, double right_ratio, double fixed,
                          int64_t sum_qmin, int64_t sum_qmax, bool residual_first) {
  check_code(zero_point, y_signed, "y_zero_point");
  check_range(qmin, qmax, y_signed, "[qmin, qmax]");
  Requantize r{};
  r.zero_point = static_cast<int32_t>(zero_point);
  r.qmin = static_cast<int32_t>(qmin);
  r.qmax = static_cast<int32_t>(qmax);
  r.y_signed = y_signed;
  if (!residual) return r;
  check_range(sum_qmin, sum_qmax, y_signed, "[sum_qmin, sum_qmax]");
  r.add = true;
  r.residual_first = residual_first;
  r.residual_signed = is_signed(*residual, "residual");
  r.left_ratio = static_cast<float>(left_ratio);
  r.right_ratio = static_cast<float>(right_ratio);
  r.fixed = static_cast<float>(fixed);
  r.sum_qmin = static_cast<int32_t>(sum_qmin);
  r.sum_qmax = static_cast<int32_t>(sum_qmax);
  return r;
}

int32_t narrow(int64_t value, const char* name) {
  check(0 <= value && value < (int64_t{1} << 30), std::string(name) + " " + std::to_string(value) +
                                                      " is negative or does not fit 30 bits");
  return static_cast<int32_t>(value);
}

Tensor int8_gemm(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor multiplier, int64_t x_zero_point,
                 int64_t y_zero_point, int64_t qmin, int64_t qmax, bool y_signed, std::optional<Tensor> residual,
                 double left_ratio, double right_ratio, double fixed, int64_t sum_qmin, int64_t sum_qmax,
                 bool residual_first) {
  const Device device(x);
  check_cuda(x, "x", device.index);
  check(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) > 0,
        "x of shape " + shape_of(x) + " and weight of shape " + shape_of(weight) +
            " do not fit; give (M, K) and (N, K)");
  check(x.is_contiguous() && weight.is_contiguous(), "x or weight is not contiguous; call contiguous()");
  const Requantize r = requantization(y_zero_point, qmin, qmax, y_signed, residual, left_ratio, right_ratio, fixed,
                                      sum_qmin, sum_qmax, residual_first);
  const ConvShape shape{x.size(0), 1, 1, 1, 1, narrow(x.size(1), "K"), narrow(weight.size(0), "N"),
                        1, 1, 1, 1, 1, 0, 0, 1, 1};
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), weight.size(0)},
                                      y_signed ? ScalarType::Char : ScalarType::Byte);
  run({x, weight, multiplier, bias, residual}, device, shape, x_zero_point, r, y);
  return y;
}

Tensor int8_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor multiplier, int64_t x_zero_point,
                   int64_t y_zero_point, int64_t qmin, int64_t qmax, bool y_signed, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                   std::optional<Tensor> residual, double left_ratio, double right_ratio, double fixed,
                   int64_t sum_qmin, int64_t sum_qmax, bool residual_first) {
  const Device device(x);
  check_cuda(x, "x", device.index);
  check(x.dim() == 4 && weight.dim() == 4 && groups > 0 && weight.size(0) % groups == 0 && weight.numel() > 0 &&
            x.size(3) == weight.size(3) * groups,
        "x of shape " + shape_of(x) + " and weight of shape " + shape_of(weight) + " do not fit " +
            std::to_string(groups) + " groups; give (N, H, W, C) and (O, kernel_h, kernel_w, C / groups)");
  check(x.is_contiguous() && weight.is_contiguous(), "x or weight is not contiguous; call contiguous()");
  check(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
        "stride, dilation and padding have not 2, 2 and 4 values; padding is top, left, bottom, right");
  for (int i = 0; i < 2; ++i) check(stride[i] > 0 && dilation[i] > 0, "stride or dilation is not positive");
  int32_t sizes[2], out[2];
  for (int i = 0; i < 2; ++i) {
    sizes[i] = narrow(x.size(1 + i), "size of x");
    const int64_t padded = sizes[i] + int64_t{narrow(padding[i], "padding")} + narrow(padding[2 + i], "padding");
    const int64_t window = int64_t{narrow(dilation[i], "dilation")} * (narrow(weight.size(1 + i), "kernel") - 1) + 1;
    check(padded >= window, "kernel of extent " + std::to_string(window) + " is larger than the padded image, " +
                                std::to_string(padded));
    out[i] = narrow((padded - window) / narrow(stride[i], "stride") + 1, "size of y");
  }
  const Requantize r = requantization(y_zero_point, qmin, qmax, y_signed, residual, left_ratio, right_ratio, fixed,
                                      sum_qmin, sum_qmax, residual_first);
  narrow(weight.numel() / weight.size(0), "columns of the weight");
  const auto at = [](const std::vector<int64_t>& values, int i) { return static_cast<int32_t>(values[i]); };
  const ConvShape shape{x.size(0), sizes[0], sizes[1], out[0], out[1], narrow(weight.size(3), "C"),
                        narrow(weight.size(0) / groups, "O"), narrow(groups, "groups"),
                        narrow(weight.size(1), "kernel"), narrow(weight.size(2), "kernel"), at(stride, 0),
                        at(stride, 1), at(padding, 0), at(padding, 1), at(dilation, 0), at(dilation, 1)};
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), out[0], out[1], weight.size(0)},
                                      y_signed ? ScalarType::Char : ScalarType::Byte);
  run({x, weight, multiplier, bias, residual}, device, shape, x_zero_point, r, y);
  return y;
}

}  // namespace

#define QAT_SUM                                                                                                   \
  "Tensor? residual=None, float left_ratio=0, float right_ratio=0, float fixed=0, int sum_qmin=0, int sum_qmax=0, " \
  "bool residual_first=False) -> Tensor"
#define QAT_CODES                                                                                                  \
  "(Tensor x, Tensor weight, Tensor? bias, Tensor multiplier, int x_zero_point, int y_zero_point, int qmin, int qmax, " \
  "bool y_signed=False, "

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("int8_gemm" QAT_CODES QAT_SUM);
  m.def("int8_conv2d" QAT_CODES "int[] stride=[1, 1], int[] padding=[0, 0, 0, 0], int[] dilation=[1, 1], int groups=1, "
        QAT_SUM);
}

STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm));
  m.impl("int8_conv2d", TORCH_BOX(&int8_conv2d));
}
