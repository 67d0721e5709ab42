// Implicit matrix product of a convolution: which byte of memory is row m, column k of the left operand.
#pragma once

#include "host_device.h"

namespace qat::cuda {

// NHWC. A product of rows is the convolution of one pixel: height = width = kernel = 1.
struct ConvShape {
  int64_t batch;
  int32_t in_h, in_w, out_h, out_w;
  int32_t inputs, outputs;  // channels of one group
  int32_t groups;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

  QAT_HD int64_t rows() const { return batch * out_h * out_w; }
  QAT_HD int32_t depth() const { return kernel_h * kernel_w * inputs; }
};

// What a row needs, computed once a thread.
struct Row {
  int64_t image;  // offset of its image
  int32_t h, w;   // first pixel of its window
  bool exists;
};

QAT_HD Row row_of(const ConvShape& s, int64_t m) {
  const bool exists = m < s.rows();
  const int64_t pixel = exists ? m : 0, area = int64_t{s.out_h} * s.out_w;
  const int64_t image = pixel / area;
  const auto rest = static_cast<int32_t>(pixel % area);
  return {image * s.in_h * s.in_w * s.groups * s.inputs, rest / s.out_w * s.stride_h - s.pad_top,
          rest % s.out_w * s.stride_w - s.pad_left, exists};
}

enum class Source { zero, padding, memory };

struct Element {
  Source source;
  int64_t offset;
};

// Column k of the row; columns k ... k + width - 1 lie behind each other where width divides `inputs` and k. Behind the
// last column and the last row is zero; outside the image is padding, which has the code of real zero.
QAT_HD Element gather(const ConvShape& s, const Row& row, int32_t group, int32_t k) {
  if (!row.exists || k >= s.depth()) return {Source::zero, 0};
  const int32_t tap = k / s.inputs, channel = k - tap * s.inputs;
  const int32_t kh = tap / s.kernel_w, kw = tap - kh * s.kernel_w;
  const int32_t h = row.h + kh * s.dilation_h, w = row.w + kw * s.dilation_w;
  if (h < 0 || h >= s.in_h || w < 0 || w >= s.in_w) return {Source::padding, 0};
  return {Source::memory,
          row.image + (int64_t{h} * s.in_w + w) * s.groups * s.inputs + int64_t{group} * s.inputs + channel};
}

}  // namespace qat::cuda
