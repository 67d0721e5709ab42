#include "operators.h"

#include <algorithm>

#include "../kernels/integer/elementwise.h"
#include "../kernels/integer/layout.h"
#include "../kernels/integer/normalize.h"
#include "../kernels/integer/quantize.h"
#include "../kernels/integer/resize.h"
#include "../kernels/integer/table.h"
#include "check.h"

namespace qat {
namespace {

template <class T>
const T* values(const View& view) {
  return static_cast<const T*>(view.data);
}

// What the preparation of an operator knows.
struct Source {
  const Plan& plan;
  size_t number;
  const Operator& op;
  const std::vector<View>& arrays;
  const Machine& machine;
  WeightCache& weights;

  const View& x(size_t input) const { return arrays[static_cast<size_t>(op.inputs[input])]; }
  const View& y() const { return arrays[static_cast<size_t>(op.output)]; }
  // Of a constant input, null where it is absent.
  template <class T>
  const T* constant(size_t input) const {
    return op.has(input) ? values<T>(x(input)) : nullptr;
  }
};

Epilogue epilogue_of(const Source& s) {
  Epilogue e;
  const View& x = s.x(conv_x);
  const auto outputs = s.y().sizes[3];
  const auto* scales = s.constant<float>(conv_scales);
  const auto copy = [&](size_t input, std::vector<int32_t>& to) {
    if (s.op.has(input)) to.assign(s.constant<int32_t>(input), s.constant<int32_t>(input) + outputs);
  };
  e.profile = s.plan.profile;
  e.y = conv_own_grid(s.op);
  e.wide = e.profile == Profile::onnx && (x.grid.wide || e.y.wide);
  for (int64_t i = 0; i < outputs; ++i) {
    e.multiplier.push_back((x.grid.scale * scales[i]) / e.y.scale);
    e.real.push_back(static_cast<double>(scales[i]) * static_cast<double>(x.grid.scale));
  }
  copy(conv_bias, e.bias);
  copy(conv_multipliers, e.fixed);
  copy(conv_shifts, e.shift);
  e.table = s.constant<uint8_t>(conv_table);
  e.add = s.op.has(conv_residual);
  if (e.add) {
    e.residual_first = s.op.ints[8] != 0;
    e.residual = s.x(conv_residual).grid;
    e.residual_type = s.x(conv_residual).type;
    e.sum = s.y().grid;
  }
  return e;
}

Prepared prepare_conv_layer(const Source& s, const Machine& machine) {
  const View &x = s.x(conv_x), &w = s.x(conv_weight);
  const auto size = [](int64_t v) { return static_cast<int32_t>(v); };
  const Weights weights{w.data,
                        w.type,
                        s.constant<int32_t>(conv_zero_points),
                        size(w.sizes[0]),
                        size(x.sizes[3]),
                        size(s.op.ints[6]),
                        size(w.sizes[1]),
                        size(w.sizes[2])};
  const ConvShape shape = conv_shape(s.op, x, s.y());
  const auto packed = s.weights.find(s.number, machine.isa, weights, x.type, shape.transposed);
  const auto layer = prepare_conv(packed, shape, x.type, x.grid, s.y().type, epilogue_of(s));
  const bool add = s.op.has(conv_residual);
  Call call = [layer, add](const Machine& m, const View* in, const View& y, void* scratch) {
    run_conv(*layer, m.threads, in[conv_x].data, y.data, add ? in[conv_residual].data : nullptr, scratch);
  };
  return {std::move(call), conv_scratch(*layer, machine.threads.count)};
}

// For each product, where the matrix of `v` is, in matrices.
std::vector<int64_t> matrix_indices(const View& v, const View& y) {
  std::vector<int64_t> index{0};
  int64_t strides[max_rank], stride = 1;
  for (int32_t d = v.rank - 3; d >= 0; --d) {
    strides[d] = v.sizes[d] == 1 ? 0 : stride;
    stride *= v.sizes[d];
  }
  for (int32_t d = 0; d < y.rank - 2; ++d) {
    const int32_t own = d - (y.rank - v.rank);
    std::vector<int64_t> next;
    next.reserve(index.size() * static_cast<size_t>(y.sizes[d]));
    for (int64_t base : index) {
      for (int64_t i = 0; i < y.sizes[d]; ++i) next.push_back(base + (own < 0 ? 0 : i * strides[own]));
    }
    index = std::move(next);
  }
  return index;
}

Prepared prepare_matmul(const Source& s, const Machine& machine) {
  const View &a = s.x(0), &b = s.x(1), &y = s.y();
  struct Product {
    std::vector<int64_t> a, b;
    MatmulShape shape;
  };
  auto product = std::make_shared<Product>();
  product->a = matrix_indices(a, y);
  product->b = matrix_indices(b, y);
  product->shape = {static_cast<int64_t>(product->a.size()),
                    y.sizes[y.rank - 2],
                    y.sizes[y.rank - 1],
                    a.sizes[a.rank - 1],
                    s.op.ints[0] != 0,
                    product->a.data(),
                    product->b.data()};
  const int64_t scratch = matmul_scratch(machine.isa, product->shape, machine.threads.count);
  Call call = [product](const Machine& m, const View* x, const View& result, void* memory) {
    run_matmul(m.isa, m.threads, product->shape, x[0], x[1], result, memory);
  };
  return {std::move(call), scratch};
}

Call softmax_call(const Source& s) {
  const auto axis = static_cast<int32_t>(s.op.ints[0]);
  const auto table = std::make_shared<const SoftmaxTable>(
      prepare_softmax(s.x(0).grid, s.y().grid, s.x(0).sizes[axis]));
  return [table, axis](const Machine& m, const View* x, const View& y, void*) {
    softmax(m.isa, m.threads, x[0], axis, table.get(), y);
  };
}

Call pad_call(const Operator& op) {
  return [&op](const Machine& m, const View* x, const View& y, void*) {
    pad(m.isa, m.threads, x[0], op.ints.data() + 2, static_cast<PadMode>(op.ints[0]),
        static_cast<int32_t>(op.ints[1]), y);
  };
}

Call resize_call(const Operator& op) {
  if (op.kind == Kind::resize_nearest) {
    return [](const Machine& m, const View* x, const View& y, void*) {
      resize_nearest(m.isa, m.threads, x[0], values<int32_t>(x[1]), values<int32_t>(x[2]), y);
    };
  }
  return [](const Machine& m, const View* x, const View& y, void*) {
    const LinearTaps h{values<int32_t>(x[1]), values<int32_t>(x[2]), values<float>(x[3])};
    const LinearTaps w{values<int32_t>(x[4]), values<int32_t>(x[5]), values<float>(x[6])};
    resize_linear(m.isa, m.threads, x[0], h, w, y);
  };
}

// Functions of operands without a preparation.
Call binary(void (*function)(const char*, const Threads&, const View&, const View&, const View&)) {
  return [function](const Machine& m, const View* x, const View& y, void*) {
    function(m.isa, m.threads, x[0], x[1], y);
  };
}

Call unary(void (*function)(const char*, const Threads&, const View&, const View&)) {
  return [function](const Machine& m, const View* x, const View& y, void*) { function(m.isa, m.threads, x[0], y); };
}

Call pool_call(const Operator& op) {
  const PoolShape shape = pool_shape(op);
  const auto function = op.kind == Kind::max_pool ? max_pool : avg_pool;
  return [shape, function](const Machine& m, const View* x, const View& y, void*) {
    function(m.isa, m.threads, x[0], shape, y);
  };
}

// The others take a list of integers and, the last three, constants.
Call call_of(const Operator& op) {
  const int64_t* ints = op.ints.data();
  const auto count = static_cast<int32_t>(op.ints.size());
  const int64_t first = op.ints.empty() ? 0 : op.ints[0];
  const auto axis = static_cast<int32_t>(first);
  switch (op.kind) {
    case Kind::quantize:
      return [=](const Machine& m, const View* x, const View& y, void*) { quantize(m.isa, m.threads, x[0], y, ints); };
    case Kind::dequantize:
      return [=](const Machine& m, const View* x, const View& y, void*) {
        dequantize(m.isa, m.threads, x[0], y, ints);
      };
    case Kind::requantize: return unary(requantize);
    case Kind::add: return binary(add);
    case Kind::sub: return binary(sub);
    case Kind::mul: return binary(mul);
    case Kind::div: return binary(div);
    case Kind::max_pool:
    case Kind::avg_pool: return pool_call(op);
    case Kind::mean:
      return [=](const Machine& m, const View* x, const View& y, void*) {
        mean(m.isa, m.threads, x[0], ints, count, y);
      };
    case Kind::resize_nearest:
    case Kind::resize_linear: return resize_call(op);
    case Kind::concat: {
      const auto parts = static_cast<int32_t>(op.inputs.size());
      return [=](const Machine& m, const View* x, const View& y, void*) {
        concat(m.isa, m.threads, x, parts, axis, y);
      };
    }
    case Kind::pad: return pad_call(op);
    case Kind::transpose:
      return [=](const Machine& m, const View* x, const View& y, void*) { transpose(m.isa, m.threads, x[0], ints, y); };
    case Kind::slice:
      return [=](const Machine& m, const View* x, const View& y, void*) {
        slice(m.isa, m.threads, x[0], ints, ints + y.rank, y);
      };
    case Kind::roll:
      return [=](const Machine& m, const View* x, const View& y, void*) { roll(m.isa, m.threads, x[0], ints, y); };
    case Kind::layer_norm: {
      const float epsilon = op.floats[0];
      return [=](const Machine& m, const View* x, const View& y, void*) {
        layer_norm(m.isa, m.threads, x[0], axis, values<float>(x[1]), values<float>(x[2]), epsilon, y);
      };
    }
    case Kind::table:
      return [](const Machine& m, const View* x, const View& y, void*) {
        apply_table(m.isa, m.threads, x[0], x[1].data, y);
      };
    case Kind::prelu:
      return [=](const Machine& m, const View* x, const View& y, void*) {
        prelu(m.isa, m.threads, x[0], values<float>(x[1]), x[1].count(), axis, y);
      };
    // a reshape is never called
    default: return unary(expand);
  }
}

}  // namespace

std::shared_ptr<const PackedWeights> WeightCache::find(size_t op, const char* isa, const Weights& weights, Type x,
                                                       bool transposed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::weak_ptr<const PackedWeights>& entry = packed_[{op, isa}];
  std::shared_ptr<const PackedWeights> found = entry.lock();
  if (found == nullptr) {
    found = pack_weights(isa, weights, x, transposed);
    entry = found;
  }
  return found;
}

Prepared prepare_operator(const Plan& plan, size_t op, const std::vector<View>& arrays, const Machine& machine,
                          WeightCache& weights) {
  const Source source{plan, op, plan.operators[op], arrays, machine, weights};
  switch (source.op.kind) {
    case Kind::conv: return prepare_conv_layer(source, machine);
    case Kind::matmul: return prepare_matmul(source, machine);
    case Kind::softmax: return {softmax_call(source), 0};
    default: return {call_of(source.op), 0};
  }
}

}  // namespace qat
