"""The hyperbolic tangent of weights, in single operations of float32, so that every path has the same bits.

Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients"
(2016), section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat import native

#: `x P(x**2) / Q(x**2)`, by rising powers; least in the largest relative error, 2e-8, up to `_BOUND`, where the tangent
#: has come to 1 but for half a step of float32. csrc/kernels/tanh_terms.h has the same numbers
_ABOVE = (1.0, 0.13381008803844452, 0.003495568409562111, 2.060875885945279e-05, 1.3354225281148047e-08)
_BELOW = (1.0, 0.4671432375907898, 0.025876907631754875, 0.0003285602724645287, 7.776376946821983e-07)
_BOUND = 9.0


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent of float32 numbers, less than 7 steps of float32 off, in [-1, 1]; no gradient."""
    held = torch.clamp(x.detach(), -_BOUND, _BOUND)
    square = held * held
    above, below = (torch.full_like(held, terms[-1]) for terms in (_ABOVE, _BELOW))
    for p, q in zip(reversed(_ABOVE[:-1]), reversed(_BELOW[:-1]), strict=True):
        # a product and a sum: `addcmul` may round once
        above, below = above * square + p, below * square + q
    return torch.clamp(held * above / below, -1.0, 1.0)


@torch.no_grad()
def tanh_ratio(weight: Tensor) -> Tensor:
    """Return the largest magnitude over its tangent, 1 where that is zero or nan; float32, one value."""
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    return torch.where(largest > 0, largest / tanh(largest), 1.0)


def tanh_weight(weight: Tensor) -> Tensor:
    """Return `tanh(w) * max(abs(w)) / tanh(max(abs(w)))`; the ratio is a constant to the gradient.

    Args:
        weight: float32, any shape.
    """
    if native.runs_on(weight.device):
        return native.tanh_weight(weight)
    out: Tensor = _TanhWeight.apply(weight)  # type: ignore[no-untyped-call]
    return out


class _TanhWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ratio = tanh_ratio(weight)
        ctx.save_for_backward(weight, ratio)
        return tanh(weight) * ratio

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, ratio = ctx.saved_tensors
        reached = tanh(weight)
        slope: Tensor = grad * ratio * (1.0 - reached * reached)
        return slope
