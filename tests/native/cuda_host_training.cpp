// The logic of the kernels of training in csrc/cuda on the host: whole launches as loops over threads.
#include <vector>

#include "../../csrc/cuda/affine.h"
#include "../../csrc/cuda/average.h"
#include "../../csrc/cuda/bins.h"
#include "../../csrc/cuda/walk.h"
#include "../../csrc/cuda/weight.h"
#include "../../csrc/kernels/grid.h"

using namespace qat::cuda;
using qat::GridRule;
using qat::Layout;
using qat::NormSteps;
using qat::Range;
using qat::Tracked;

namespace {

constexpr int64_t threads = 96;  // of a grid-stride loop

// f(number of the octet, first element, elements), thread by thread.
template <class F>
void over_octets(int64_t n, F f) {
  for (int64_t thread = 0; thread < threads; ++thread) {
    for (int64_t o = thread; o * octet < n; o += threads) {
      const int64_t start = o * octet;
      f(o, start, static_cast<int>(n - start < octet ? n - start : octet));
    }
  }
}

template <class T>
Octet<T> read(const T* from, int count) {
  Octet<T> v{};
  std::memcpy(v.value, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <class T>
void write(T* to, const Octet<T>& v, int count) {
  std::memcpy(to, v.value, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
void pass(const T* x, T* y, uint8_t* bits, int64_t n, int64_t channels, int64_t inner, const float* scale,
          const float* zero_point, Range range, float* low, float* high, int64_t* nonfinite) {
  over_octets(n, [&](int64_t o, int64_t start, int count) {
    uint32_t count_nonfinite = 0;
    Octet<T> v = read(x + start, count);
    const Channel<uint32_t> at(static_cast<uint32_t>(start), static_cast<uint32_t>(channels),
                               static_cast<uint32_t>(inner));
    observe_octet(v, count, at, count_nonfinite, [&](uint32_t c, float l, float h) {
      low[c] = smaller(low[c], l);
      high[c] = larger(high[c], h);
    });
    bits[o] = channels == 1 ? quantize_octet<false>(v, count, at, scale, zero_point, range)
                            : quantize_octet<true>(v, count, at, scale, zero_point, range);
    write(y + start, v, count);
    *nonfinite += count_nonfinite;
  });
}

// add(sum, offset) for the elements of a channel, by the threads of a block.
template <class Sum, class Add>
Sum reduced(const Layout& layout, int64_t channel, const Add& add) {
  constexpr int64_t step = 24;
  Sum all;
  all.clear();
  for (int64_t thread = 0; thread < step; ++thread) {
    Sum own;
    own.clear();
    Walk walk(layout, channel, thread, step);
    for (int64_t p = thread; p < layout.outer * layout.inner; p += step) {
      add(own, walk.at);
      walk.next();
    }
    all.merge(own);
  }
  return all;
}

float value_or(const float* values, int64_t channel, float missing) {
  return values == nullptr ? missing : values[channel];
}

bool bit(const uint8_t* bits, int64_t at) { return (bits[at / 8] >> (at % 8)) & 1; }

}  // namespace

extern "C" {

// The quantizer of a fused pass: `quantizes`, `tracks`, its range of codes and rule, and its buffers.
struct Quantizer {
  int32_t quantizes, tracks;
  int64_t qmin, qmax;
  int32_t symmetric;
  int64_t middle;
  int32_t power_of_two;
  float momentum, low_bound, high_bound;
  float *low, *high, *scale;
  int32_t* zero_point;
};

GridRule rule_of(const Quantizer& q) { return {q.qmin, q.qmax, q.symmetric != 0, q.middle, q.power_of_two != 0}; }

NormSteps steps_of(const Quantizer& q) {
  const bool quantize = q.quantizes != 0;
  return {q.low_bound, q.high_bound, quantize, quantize ? *q.scale : 1.0f,
          quantize ? static_cast<float>(*q.zero_point) : 0.0f,
          {static_cast<float>(q.qmin), static_cast<float>(q.qmax)}};
}

void follow(const Quantizer& q, Reached all, bool finite) {
  all.numbers = all.numbers && finite;
  const Range range = all.clamped({q.low_bound, q.high_bound});
  qat::grid::track(range.low, range.high, q.momentum, rule_of(q), {q.low, q.high, q.scale, q.zero_point}, 0);
}

void fake_quantize_f32(const float* x, float* y, uint8_t* bits, int64_t n, int64_t channels, int64_t inner,
                       const float* scale, const float* zero_point, float qmin, float qmax, float* low, float* high,
                       int64_t* nonfinite) {
  pass(x, y, bits, n, channels, inner, scale, zero_point, {qmin, qmax}, low, high, nonfinite);
}

void fake_quantize_bf16(const uint16_t* x, uint16_t* y, uint8_t* bits, int64_t n, int64_t channels, int64_t inner,
                        const float* scale, const float* zero_point, float qmin, float qmax, float* low, float* high,
                        int64_t* nonfinite) {
  pass(x, y, bits, n, channels, inner, scale, zero_point, {qmin, qmax}, low, high, nonfinite);
}

// How many bins have a private counter; -1 where the maps are not each other's inverse, or leave the table.
int private_count(int mantissa_bits) {
  const Bins bins(mantissa_bits);
  int kept = 0;
  for (uint32_t bin = 0; bin < bins.count(); ++bin) {
    const int slot = bins.slot(bin);
    if (slot >= 2 * bins.half || 2 * bins.half > private_bins || (slot >= 0 && bins.bin(slot) != bin)) return -1;
    kept += slot >= 0;
  }
  return kept;
}

void histogram(const float* x, int64_t n, int mantissa_bits, int64_t* counts) {
  const Bins bins(mantissa_bits);
  for (int64_t i = 0; i < n; ++i) {
    if (is_finite(x[i])) ++counts[bins.of(x[i])];
  }
}

void learned(const float* x, const float* grad, float* dx, int64_t outer, int64_t channels, int64_t inner,
             const float* scale, const float* zero_point, float qmin, float qmax, double grad_scale, float* dscale,
             float* dzero) {
  const Layout layout{outer, channels, inner};
  for (int64_t c = 0; c < channels; ++c) {
    const float z = nearest_code(zero_point[c], {qmin, qmax});
    const Pair sums = reduced<Pair>(layout, c, [&](Pair& own, int64_t at) {
      const LearnedTerms t = learned_terms(x[at], grad[at], scale[c], z, {qmin, qmax});
      dx[at] = t.inside ? grad[at] : 0.0f;
      own.add(t.scale, t.zero_point);
    });
    dscale[c] = static_cast<float>(sums.first * grad_scale);
    dzero[c] = static_cast<float>(sums.second * grad_scale);
  }
}

void average(float* low, float* high, const float* batch_low, const float* batch_high, int64_t channels,
             double momentum) {
  for (int64_t c = 0; c < channels; ++c) move_average(low[c], high[c], batch_low[c], batch_high[c], momentum);
}

void track(const float* low, const float* high, int64_t channels, const Quantizer* q) {
  const Tracked state{q->low, q->high, q->scale, q->zero_point};
  for (int64_t c = 0; c < channels; ++c) qat::grid::track(low[c], high[c], q->momentum, rule_of(*q), state, c);
}

// y = fake_quantize(w * f) / f on the grids of w * f; `map`: the fields of ChannelMap.
void weight(const float* w, float* y, uint8_t* bits, int64_t outer, int64_t channels, int64_t inner, const float* gamma,
            const float* var, float eps, float floor, const int64_t* map, const Quantizer* q) {
  const BatchNorm f{gamma, var, eps, floor, {map[0], map[1], map[2], map[3], map[4]}};
  const Layout layout{outer, channels, inner};
  const int64_t n = layout.size();
  std::vector<float> folded(static_cast<size_t>(n)), zeros(static_cast<size_t>(channels));
  for (int64_t i = 0; i < n; ++i) folded[static_cast<size_t>(i)] = w[i] * f(i);
  for (int64_t c = 0; c < channels; ++c) {
    Extrema range = {};
    range.clear();
    Walk walk(layout, c, 0, 1);
    for (int64_t p = 0; p < outer * inner; ++p, walk.next()) range.add(folded[static_cast<size_t>(walk.at)]);
    const qat::CodeGrid grid = qat::grid::of_range(range.low, range.high, rule_of(*q));
    q->scale[c] = grid.scale;
    zeros[static_cast<size_t>(c)] = static_cast<float>(grid.zero_point);
  }
  over_octets(n, [&](int64_t o, int64_t start, int count) {
    Octet<float> v = read(folded.data() + start, count);
    const Channel<int64_t> at(start, channels, inner);
    bits[o] = quantize_octet<true>(v, count, at, q->scale, zeros.data(),
                                   {static_cast<float>(q->qmin), static_cast<float>(q->qmax)});
    write(folded.data() + start, v, count);
  });
  for (int64_t i = 0; i < n; ++i) y[i] = divide(folded[static_cast<size_t>(i)], f(i));
}

void norm_forward(const float* x, int64_t outer, int64_t channels, int64_t inner, const float* gamma, const float* beta,
                  float* running_mean, float* running_var, int batch_statistics, double momentum, double eps,
                  const Quantizer* q, float* y, uint8_t* bits, float* mean, float* inverse) {
  const Layout layout{outer, channels, inner};
  const auto count = static_cast<double>(outer * inner);
  std::vector<float> factor(static_cast<size_t>(channels)), shift(factor);
  Reached all;
  all.clear();
  bool finite = true;
  for (int64_t c = 0; c < channels; ++c) {
    const Moments m = reduced<Moments>(layout, c, [&](Moments& own, int64_t at) {
      own.add(x[at]);
      finite = finite && (batch_statistics != 0 || is_finite(x[at]));
    });
    if (batch_statistics != 0) {
      const Statistics s = statistics_of(m, count, eps);
      mean[c] = s.mean;
      inverse[c] = s.inverse;
      running_mean[c] = moved_statistic(running_mean[c], s.center, momentum);
      running_var[c] = moved_statistic(running_var[c], s.spread * count / (count - 1.0), momentum);
    } else {
      mean[c] = running_mean[c];
      inverse[c] = frozen_inverse(running_var[c], static_cast<float>(eps));
    }
    const Line line = line_of(mean[c], inverse[c], value_or(gamma, c, 1.0f), value_or(beta, c, 0.0f));
    factor[static_cast<size_t>(c)] = line.factor;
    shift[static_cast<size_t>(c)] = line.shift;
    Reached own;
    own.clear();
    own.add(m.low, line);
    own.add(m.high, line);
    all.merge(own);
  }
  if (q->tracks != 0) follow(*q, all, finite);
  const NormSteps steps = steps_of(*q);
  over_octets(layout.size(), [&](int64_t o, int64_t start, int count_of) {
    Octet<float> v = read(x + start, count_of), factors, shifts;
    const Channel<uint32_t> at(static_cast<uint32_t>(start), static_cast<uint32_t>(channels),
                               static_cast<uint32_t>(inner));
    spread(factors, factor.data(), count_of, at);
    spread(shifts, shift.data(), count_of, at);
    bits[o] = norm_octet(v, count_of, factors, shifts, steps);
    write(y + start, v, count_of);
  });
}

void norm_backward(const float* x, const float* grad, const uint8_t* bits, int64_t outer, int64_t channels,
                   int64_t inner, const float* gamma, const float* mean, const float* inverse, int batch_statistics,
                   float* dx, float* dgamma, float* dbeta) {
  const Layout layout{outer, channels, inner};
  const auto count = static_cast<double>(outer * inner);
  for (int64_t c = 0; c < channels; ++c) {
    const Pair sums = reduced<Pair>(layout, c, [&](Pair& own, int64_t at) {
      add_product(own, bit(bits, at) ? grad[at] : 0.0f, x[at]);
    });
    const Slope s = slope_of(sums, mean[c], inverse[c], value_or(gamma, c, 1.0f));
    dgamma[c] = s.dgamma;
    dbeta[c] = s.dbeta;
    const auto slope = static_cast<float>(s.slope / count), offset = static_cast<float>(s.offset / count);
    Walk walk(layout, c, 0, 1);
    for (int64_t p = 0; p < outer * inner; ++p, walk.next()) {
      const float g = bit(bits, walk.at) ? grad[walk.at] : 0.0f;
      dx[walk.at] = batch_statistics != 0 ? norm_gradient(g, x[walk.at], s.factor, slope, mean[c], offset)
                                          : g * s.factor;
    }
  }
}

void add_forward(const float* x, const float* other, int64_t n, const Quantizer* q, float* y, uint8_t* bits) {
  if (q->tracks != 0) {
    Extrema own = {};
    own.clear();
    for (int64_t i = 0; i < n; ++i) own.add(x[i] + other[i]);
    Reached all;
    all.clear();
    all.add(own.low, {1.0f, 0.0f});
    all.add(own.high, {1.0f, 0.0f});
    follow(*q, all, own.nonfinite == 0);
  }
  const NormSteps steps = steps_of(*q);
  over_octets(n, [&](int64_t o, int64_t start, int count) {
    Octet<float> a = read(x + start, count);
    const Octet<float> b = read(other + start, count);
    bits[o] = add_octet(a, b, count, steps);
    write(y + start, a, count);
  });
}

// Whether the walks of a channel's threads visit each of its elements once.
int visits_once(int64_t outer, int64_t channels, int64_t inner, int64_t step) {
  std::vector<int> seen(static_cast<size_t>(outer * channels * inner));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t thread = 0; thread < step; ++thread) {
      Walk walk({outer, channels, inner}, c, thread, step);
      for (int64_t p = thread; p < outer * inner; p += step, walk.next()) {
        if (walk.at / inner % channels != c) return 0;
        ++seen[static_cast<size_t>(walk.at)];
      }
    }
  }
  for (const int count : seen) {
    if (count != 1) return 0;
  }
  return 1;
}

}  // extern "C"
