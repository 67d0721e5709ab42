// Convolution, transposed convolution, fully connected layers and products of activations, with everything that happens
// to an accumulator fused: bias, requantization, clamp, addition of a residual, a table.
//
// The life of a layer: `prepare_*` once for a shape (packs nothing that depends on data; allocates), `run` any number of
// times (allocates nothing). Packed weights are shared by all shapes of a layer. Sums of 8-bit products wrap around at 32
// bits (that they stay inside is proven at export); with more than 8 bits they are exact.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "view.h"

namespace qat {

// From accumulators to codes; the vectors hold one value an output channel.
struct Epilogue {
  Profile profile = Profile::onnx;
  // The activation or the result is `wide`: code = quantize(float32(double(acc) * real), y), see `requantize_wide`.
  bool wide = false;
  std::vector<float> multiplier;  // onnx: (x_scale * w_scale) / y_scale, each operation in float32
  std::vector<int32_t> fixed;     // tflite: multiplier in [2^30, 2^31) or 0
  std::vector<int32_t> shift;     // tflite: positive is left
  std::vector<double> real;       // wide: double(w_scale) * double(x_scale)
  std::vector<int32_t> bias;      // empty or codes of scale x_scale * w_scale
  Grid y{};                       // of the layer's own result
  // Codes of the result to codes of a following function of one tensor: entry i is for code y.qmin + i; 8 bits; or null.
  const uint8_t* table = nullptr;
  // Addition of a residual of 8 bits to the result, QLinearAdd of qat/integer/kernels/elementwise.py; not with a table.
  bool add = false;
  bool residual_first = false;  // the residual is the left operand
  Grid residual{};
  Type residual_type = Type::u8;
  Grid sum{};                   // of the sum
};

// Weights (output channels, kernel_h, kernel_w, input channels / groups), s8 or s4, zero point 0 or one a channel.
struct Weights {
  const void* data;
  Type type;
  const int32_t* zero_points;  // null: 0
  int32_t outputs;
  int32_t inputs;  // of all groups
  int32_t groups;
  int32_t kernel_h, kernel_w;
};

struct ConvShape {
  int64_t batch;
  int32_t in_h, in_w, out_h, out_w;
  int32_t stride_h, stride_w;
  int32_t pad_top, pad_left;  // what lies below and to the right follows from out_h, out_w
  int32_t dilation_h, dilation_w;
  bool transposed;
};

class PackedWeights;  // in the order of one instruction set
class ConvLayer;      // for one shape

// `isa`: as in find_kernels; "" is the best. Throws std::bad_alloc only. x: type and grid of the activation.
std::shared_ptr<const PackedWeights> pack_weights(const char* isa, const Weights& weights, Type x, bool transposed);

// A fully connected layer over `rows` rows is a 1x1 convolution of shape (1, 1, rows, C).
std::shared_ptr<const ConvLayer> prepare_conv(std::shared_ptr<const PackedWeights> weights, const ConvShape& shape, Type x,
                                        const Grid& x_grid, Type y, const Epilogue& epilogue);

// x (batch, in_h, in_w, C), y (batch, out_h, out_w, O), residual as y or null; y may be residual. `scratch` has
// conv_scratch(layer, threads) bytes, aligned to 64. Up to 64 bytes behind x and residual may be read (never used).
int64_t conv_scratch(const ConvLayer& layer, int32_t threads);
void run_conv(const ConvLayer& layer, const Threads& threads, const void* x, void* y, const void* residual,
              void* scratch);

// a (batch_a, m, k) times b (batch_b, k, n), or (batch_b, n, k) if transposed; 8-bit or 16-bit codes. batch index i reads
// a at a_index[i] and b at b_index[i] (broadcasting is the caller's).
struct MatmulShape {
  int64_t batch, m, n, k;
  bool b_transposed;
  const int64_t* a_index;
  const int64_t* b_index;
};
int64_t matmul_scratch(const char* isa, const MatmulShape& shape, int32_t threads);
// Profile onnx; wide where one of the grids is. Up to 64 bytes behind a may be read (never used).
void run_matmul(const char* isa, const Threads& threads, const MatmulShape& shape, const View& a, const View& b,
                const View& y, void* scratch);

// Which instruction set `isa` ("" for the best) stands for here; null where it is unknown or, but for `unchecked`, cannot
// run.
const char* find_integer_isa(const char* isa, bool unchecked = false);

}  // namespace qat
