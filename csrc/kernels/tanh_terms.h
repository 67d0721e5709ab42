// The hyperbolic tangent of DoReFa's weights: x P(x^2) / Q(x^2), clamped, in single operations of float32.
//
// The coefficients, by rising powers, are least in the largest relative error, 2e-8, up to the bound, where the tangent has
// come to 1 but for half a step of float32. qat/quantizers/tanh.py has the same bits.
#pragma once

#include "hd.h"

namespace qat {

constexpr float tanh_bound = 9.0f;
constexpr int tanh_degree = 4;

// unnamed: the files of all instruction sets include this; functions: the GPU has no arrays of the host
namespace {

QAT_HD constexpr float tanh_above(int power) {
  constexpr float terms[] = {1.0f, 0.13381008803844452f, 0.003495568409562111f, 2.060875885945279e-05f,
                             1.3354225281148047e-08f};
  return terms[power];
}

QAT_HD constexpr float tanh_below(int power) {
  constexpr float terms[] = {1.0f, 0.4671432375907898f, 0.025876907631754875f, 0.0003285602724645287f,
                             7.776376946821983e-07f};
  return terms[power];
}

}  // namespace
}  // namespace qat
