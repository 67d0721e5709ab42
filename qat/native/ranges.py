"""Native fake quantization on grids that follow the data: weights, and activations in training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.native.operators import axis_of, straight_through


class GridRule(NamedTuple):
    """How a range becomes a grid, as `qat.numerics.range_to_scale`.

    Attributes:
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension of the channels, negative from the end; None for per-tensor.
        symmetric: The zero point is `middle`.
        middle: The symmetric zero point.
        power_of_two: Scales are rounded up to a power of two.
    """

    qmin: int
    qmax: int
    axis: int | None
    symmetric: bool
    middle: int
    power_of_two: bool


class BatchNormFactor(NamedTuple):
    """The factor `gamma / sqrt(var + eps)` of a weight's output channels.

    Attributes:
        gamma: float32, (output channels,); None for ones.
        var: Likewise: the running variance.
        eps: Of the batch norm.
        gamma_floor: Smallest magnitude of gamma that is used.
        channel_axis: Axis of the output channels: 0, or 1 for transposed convolutions.
        groups: Groups of a transposed convolution, whose output channels are groups x the axis.
    """

    gamma: Tensor | None
    var: Tensor
    eps: float
    gamma_floor: float
    channel_axis: int
    groups: int


def fake_quantize_weight(
    weight: Tensor, rule: GridRule, factor: BatchNormFactor | None = None, grid: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return `fake_quantize(weight * f) / f` with the factor f of a batch norm, bit for bit as in PyTorch.

    The gradient is straight through the range mask, of which one bit an element is kept.

    Args:
        weight: Any shape.
        rule: How the range of `weight * f`, by channel, becomes the grid.
        factor: Where f comes from; None for no factor.
        grid: Scale and zero point, as in `fake_quantize`; None for those of the range.
    """
    scale, zero_point = (None, None) if grid is None else grid
    gamma, var, eps, floor, channel_axis, groups = (None, None, 0.0, 0.0, 0, 1) if factor is None else factor
    qmin, qmax, axis, symmetric, middle, power_of_two = rule
    return straight_through(
        torch.ops.qat.fake_quantize_weight_forward.default,
        weight, scale, zero_point, gamma, var, eps, floor, qmin, qmax, axis_of(weight, axis), symmetric, middle,
        power_of_two, channel_axis, groups,
    )  # fmt: skip


def fake_quantize_track(
    x: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], momentum: float, rule: GridRule
) -> Tensor:
    """Move a range towards that of `x`, set the grid from it, and return `x` fake-quantized.

    `v += momentum * (batch - v)` in float32, the first batch as it is. Channels that hold nan or infinities leave their
    range as it was.

    Args:
        x: Any shape.
        state: Buffers that change: smallest and largest value and scale, float32, zero point, int32, one value or (C,),
            and the samples that came in so far, int64, one value.
        momentum: Weight of this batch.
        rule: How the range becomes the grid.
    """
    qmin, qmax, axis, symmetric, middle, power_of_two = rule
    return straight_through(
        torch.ops.qat.fake_quantize_track_forward.default,
        x, *state, momentum, qmin, qmax, axis_of(x, axis), symmetric, middle, power_of_two,
    )  # fmt: skip


def register() -> None:
    """Register fake kernels and the gradient of weights, once, after the library is loaded."""
    torch.library.register_fake("qat::fake_quantize_weight_forward", _fake_weight)
    torch.library.register_fake("qat::fake_quantize_track_forward", _fake_track)
    torch.library.register_autograd("qat::fake_quantize_weight_forward", _weight_gradient, setup_context=_keep_mask)


def _like(x: Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(((x.numel() + 7) // 8 if with_mask else 0,), dtype=torch.uint8)


def _fake_weight(
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    gamma: Tensor | None,
    var: Tensor | None,
    eps: float,
    gamma_floor: float,
    qmin: int,
    qmax: int,
    axis: int,
    symmetric: bool,
    middle: int,
    power_of_two: bool,
    channel_axis: int = 0,
    groups: int = 1,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    for name, tensor in (("scale", scale), ("zero_point", zero_point), ("gamma", gamma), ("var", var)):
        if tensor is not None and tensor.device != weight.device:
            raise RuntimeError(
                f"qat: {name} is on {tensor.device} and weight on {weight.device}; give tensors of one device"
            )
    return _like(weight, with_mask)


def _fake_track(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    tracked: Tensor,
    momentum: float,
    qmin: int,
    qmax: int,
    axis: int,
    symmetric: bool,
    middle: int,
    power_of_two: bool,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    return _like(x, with_mask)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask_bits = output
    ctx.mark_non_differentiable(mask_bits)
    ctx.set_materialize_grads(False)
    ctx.strides = y.stride() if inputs[-1] else None
    ctx.save_for_backward(mask_bits)


def _weight_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    if ctx.strides is None:
        raise RuntimeError("qat: fake_quantize_weight has no gradient with with_mask=False; ask for the mask")
    (mask_bits,) = ctx.saved_tensors
    return torch.ops.qat.fake_quantize_backward(grad, mask_bits, ctx.strides), *((None,) * 15)
