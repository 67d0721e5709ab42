// The launches of csrc/cuda as the registrations of csrc/torch/cuda_*.cpp queue them, on memory of the host.
#include <vector>

#include "cuda/bins.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

using namespace qat::cuda;
using qat::ExtremaOut;
using qat::GridRule;
using qat::Layout;
using qat::Range;

namespace {

// Memory that nobody cleared, aligned as torch's.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(static_cast<size_t>(count) * sizeof(T) + 64, 0x7b) {}
  T* data() {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<char> memory_;
};

struct Batch {
  explicit Batch(int64_t channels) : low(channels), high(channels), nonfinite(1) {
    clear_extrema(out(), channels, nullptr);
  }
  ExtremaOut out() { return {low.data(), high.data(), nonfinite.data()}; }
  Buffer<float> low, high;
  Buffer<int64_t> nonfinite;
};

}  // namespace

extern "C" {

// A quantizer: whether it quantizes and tracks, its codes and rule, its buffers.
struct Quantizer {
  int32_t quantizes, tracks;
  int64_t qmin, qmax;
  int32_t symmetric;
  int64_t middle;
  int32_t power_of_two;
  float momentum, low_bound, high_bound;
  float *low, *high, *scale;
  int32_t* zero_point;
  int64_t* samples;

  GridRule rule() const { return {qmin, qmax, symmetric != 0, middle, power_of_two != 0}; }
  Range codes() const { return {static_cast<float>(qmin), static_cast<float>(qmax)}; }
  Range bounds() const { return {low_bound, high_bound}; }
  Tracking tracking() const { return {{low, high, scale, zero_point}, samples, momentum, rule()}; }
  StepsOnDevice steps() const {
    return {bounds(), quantizes != 0 ? scale : nullptr, quantizes != 0 ? zero_point : nullptr, codes()};
  }
};

void fake_quantize_f32(const float* x, float* y, uint8_t* bits, const Layout* layout, const float* scale,
                       const float* zero_point, float qmin, float qmax, float* low, float* high, int64_t* nonfinite) {
  fake_quantize(x, y, bits, *layout, scale, zero_point, {qmin, qmax}, {low, high, nonfinite}, nullptr);
}

void fake_quantize_bf16(const uint16_t* x, uint16_t* y, uint8_t* bits, const Layout* layout, const float* scale,
                        const float* zero_point, float qmin, float qmax, float* low, float* high, int64_t* nonfinite) {
  fake_quantize(x, y, bits, *layout, scale, zero_point, {qmin, qmax}, {low, high, nonfinite}, nullptr);
}

void mask_f32(const float* grad, const uint8_t* bits, float* out, int64_t n) {
  mask_gradient(grad, bits, out, n, nullptr);
}

void histogram(const float* x, const Layout* layout, int mantissa_bits, int64_t* counts, float* low, float* high,
               int64_t* nonfinite) {
  observe_histogram(x, *layout, {counts, mantissa_bits, {low, high, nonfinite}}, nullptr);
}

void observe(const float* x, const Layout* layout, double momentum, float* low, float* high, int64_t* nonfinite) {
  const ExtremaOut out{low, high, nonfinite};
  if (momentum == 0.0) {
    observe_extrema(x, *layout, out, nullptr);
    return;
  }
  Batch batch(layout->channels);
  observe_extrema(x, *layout, batch.out(), nullptr);
  move_averages(batch.out(), layout->channels, momentum, out, nullptr);
}

void learned(const float* x, const float* grad, float* y, float* dx, const Layout* layout, const float* scale,
             const float* zero_point, float qmin, float qmax, double grad_scale, float* dscale, float* dzero) {
  Buffer<float> codes(layout->channels);
  Buffer<char> scratch(reduction_scratch(*layout));
  const Range range{qmin, qmax};
  nearest_codes(zero_point, layout->channels, range, codes.data(), nullptr);
  fake_quantize(x, y, nullptr, *layout, scale, codes.data(), range, {}, nullptr);
  learned_backward(x, grad, dx, *layout, scale, codes.data(), range, grad_scale, dscale, dzero, scratch.data(),
                   nullptr);
}

void track(const float* x, float* y, uint8_t* bits, const Layout* layout, int64_t rows, const Quantizer* q) {
  Batch batch(layout->channels);
  Buffer<float> codes(layout->channels);
  observe_extrema(x, *layout, batch.out(), nullptr);
  const bool one = layout->channels == 1;
  if (!one) include_nonfinite(x, *layout, batch.out(), nullptr);
  track_ranges(batch.low.data(), batch.high.data(), one ? batch.nonfinite.data() : nullptr, layout->channels, rows,
               q->tracking(), codes.data(), nullptr);
  fake_quantize(x, y, bits, *layout, q->scale, codes.data(), q->codes(), {}, nullptr);
}

// `map`: the fields of ChannelMap.
void weight(const float* w, float* y, uint8_t* bits, const Layout* layout, const float* gamma, const float* var,
            float eps, float floor, const int64_t* map, const Quantizer* q) {
  const BatchNorm f{gamma, var, eps, floor, {map[0], map[1], map[2], map[3], map[4]}};
  const int64_t n = layout->size(), channels = layout->channels;
  Buffer<float> folded(n), scale(channels), zero_point(channels);
  fold_weight(w, n, f, folded.data(), nullptr);
  Batch range(channels);
  observe_extrema(folded.data(), *layout, range.out(), nullptr);
  include_nonfinite(folded.data(), *layout, range.out(), nullptr);
  set_grids(range.low.data(), range.high.data(), channels, q->rule(), scale.data(), zero_point.data(), nullptr);
  fake_quantize(folded.data(), folded.data(), bits, *layout, scale.data(), zero_point.data(), q->codes(), {}, nullptr);
  unfold_weight(folded.data(), n, f, y, nullptr);
}

void norm_forward(const float* x, const Layout* layout, int64_t rows, const float* gamma, const float* beta,
                  float* running_mean, float* running_var, int batch_statistics, double momentum, double eps,
                  const Quantizer* q, float* y, uint8_t* bits, float* mean, float* inverse) {
  const int64_t channels = layout->channels;
  Batch range(channels);
  Buffer<float> line(2 * channels);
  Buffer<char> scratch(reduction_scratch(*layout));
  const ExtremaOut extrema = range.out();
  const NormLines lines{mean, inverse, line.data(), line.data() + channels, extrema.low, extrema.high};
  const NormParameters parameters{gamma, beta, running_mean, running_var, momentum, eps};
  if (batch_statistics != 0) batch_lines(x, *layout, parameters, lines, scratch.data(), nullptr);
  else frozen_lines(channels, parameters, lines, nullptr);
  if (q->tracks != 0) {
    if (batch_statistics == 0) observe_extrema(x, *layout, extrema, nullptr);
    track_lines(extrema.low, extrema.high, lines.factor, lines.shift, extrema.nonfinite, channels, q->bounds(), rows,
                q->tracking(), nullptr);
  }
  norm_apply(x, y, bits, *layout, lines.factor, lines.shift, q->steps(), nullptr);
}

void norm_gradients(const float* x, const float* grad, const uint8_t* bits, const Layout* layout, const float* gamma,
                    const float* mean, const float* inverse, int batch_statistics, int with_parameters, float* dx,
                    float* dgamma, float* dbeta) {
  Buffer<float> lines(3 * layout->channels);
  Buffer<char> scratch(reduction_scratch(*layout));
  const bool sums = with_parameters != 0 || batch_statistics != 0;
  float* const factor = lines.data();
  norm_backward(x, grad, bits, *layout,
                {gamma, mean, inverse, factor, batch_statistics != 0 ? factor + layout->channels : nullptr,
                 batch_statistics != 0 ? factor + 2 * layout->channels : nullptr, sums ? dgamma : nullptr,
                 sums ? dbeta : nullptr},
                dx, scratch.data(), nullptr);
}

void add_forward(const float* x, const float* other, int64_t n, int64_t rows, const Quantizer* q, float* y,
                 uint8_t* bits) {
  if (q->tracks != 0) {
    Batch range(1);
    add_extrema(x, other, n, range.out(), nullptr);
    track_lines(range.low.data(), range.high.data(), nullptr, nullptr, range.nonfinite.data(), 1, q->bounds(), rows,
                q->tracking(), nullptr);
  }
  add_apply(x, other, y, bits, n, q->steps(), nullptr);
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

// Whether the walks of a channel's threads visit each of its elements once.
int visits_once(const Layout* layout, int64_t step) {
  std::vector<int> seen(static_cast<size_t>(layout->size()));
  for (int64_t c = 0; c < layout->channels; ++c) {
    for (int64_t thread = 0; thread < step; ++thread) {
      Walk walk(*layout, c, thread, step);
      for (int64_t p = thread; p < layout->outer * layout->inner; p += step, walk.next()) {
        if (walk.at / layout->inner % layout->channels != c) return 0;
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
