"""Batch norm or an addition, an activation, and the statistics of the result, in one operator; without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.native.norm import Bounds, Norm
from qat.native.observers import Statistics
from qat.native.operators import below_autograd


def norm_observe(x: Tensor, norm: Norm, bounds: Bounds, statistics: Statistics, *, in_place: bool = False) -> Tensor:
    """Return `clamp(batch_norm(x), *bounds)`, and take it into the statistics.

    Args:
        x: float32, (N, C, ...), on the CPU, any layout; not empty.
        norm: The batch norm, of running statistics.
        bounds: Of the activation; infinities for none.
        statistics: Of the result, per-tensor.
        in_place: The result may overwrite `x`.
    """
    y = _result(x, in_place)
    gamma, beta, mean, variance, _, _, eps = norm
    operator = torch.ops.qat.norm_observe.default
    below_autograd(operator, x, gamma, beta, mean, variance, eps, *bounds, y, *_flat(statistics))
    return y


def add_observe(x: Tensor, other: Tensor, bounds: Bounds, statistics: Statistics, *, in_place: bool = False) -> Tensor:
    """Return `clamp(x + other, *bounds)`, and take it into the statistics.

    Args:
        x: float32, on the CPU, any layout.
        other: Likewise, of the same shape.
        bounds: Of the activation; infinities for none.
        statistics: Of the result, per-tensor.
        in_place: The result may overwrite `x`.
    """
    y = _result(x, in_place)
    below_autograd(torch.ops.qat.add_observe.default, x, other, *bounds, y, *_flat(statistics))
    return y


def _result(x: Tensor, in_place: bool) -> Tensor:
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if in_place and dense else torch.empty_like(x)


def _flat(statistics: Statistics) -> tuple[object, ...]:
    """Return the arguments of the operators from `low` on."""
    low, high, nonfinite, counts, mantissa_bits, momentum = statistics
    return low, high, nonfinite, counts, mantissa_bits, momentum


def register() -> None:
    """Register fake kernels, once, after the library is loaded."""
    torch.library.register_fake("qat::norm_observe", _nothing)
    torch.library.register_fake("qat::add_observe", _nothing)


def _nothing(*_: object) -> None:
    return None
