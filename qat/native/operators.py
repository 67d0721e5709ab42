"""Calls of the native operators, and what torch must know of them: fake kernels and gradients.

The functions need `qat.native.status().active`. They take CPU tensors of float32 or bfloat16 (computed in float32) in
any layout; dense ones, such as contiguous and channels_last, are read in place. Results have the same bits for every
number of threads and every instruction set. Errors are RuntimeError with the cause.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Return `dequantize(quantize(x))`, bit for bit as `qat.quantizers.static.fake_quantize`.

    The gradient is straight through the range mask, of which one bit an element is kept.

    Args:
        x: Any shape.
        scale: Positive float32, one value, or (C,) with an axis.
        zero_point: As many float32, int32 or int64 integers.
        qmin: Smallest code, at least -2**23.
        qmax: Largest code, at most 2**23.
        axis: Dimension of the channels; None for per-tensor.
    """
    out: Tensor = torch.ops.qat.fake_quantize_forward(
        x, scale, zero_point, qmin, qmax, _axis(x, axis), torch.is_grad_enabled() and x.requires_grad
    )[0]
    return out


def fake_quantize_observe(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `fake_quantize(...)` and, of the same pass over memory, `observe_minmax(x, axis)`."""
    y, _, low, high, nonfinite = torch.ops.qat.fake_quantize_observe_forward(
        x, scale, zero_point, qmin, qmax, _axis(x, axis), torch.is_grad_enabled() and x.requires_grad
    )
    return y, low, high, nonfinite


def observe_minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest finite values, and the count of the others.

    Returns:
        Minima and maxima, float32, () or (C,), inf and -inf where there is no finite value, 0.0 for either zero; and
        the number of elements that are nan or infinite, int64, ().
    """
    low, high, nonfinite = torch.ops.qat.observe_minmax(x.detach(), _axis(x, axis))
    return low, high, nonfinite


def observe_histogram(x: Tensor, counts: Tensor, low: Tensor, high: Tensor, nonfinite: Tensor) -> None:
    """Count `x` by the upper 16 bits of its float32 patterns, and widen its range, in place.

    The bins are those of `qat.observers.binning` with 7 bits of the mantissa.

    Args:
        x: Any shape.
        counts: int64, (65536,); the bins of nan and inf are set to 0.
        low: float32, one value: the smallest finite element so far.
        high: float32, one value: the largest.
        nonfinite: int64, one value: elements that were nan or infinite.
    """
    torch.ops.qat.observe_histogram(x.detach(), counts, low, high, nonfinite)


def _axis(x: Tensor, axis: int | None) -> int:
    """Return the axis as the operators want it: not negative, or -1 for per-tensor."""
    if axis is None:
        return -1
    return axis + x.dim() if -x.dim() <= axis < 0 else axis if axis >= 0 else x.dim()


def register() -> None:
    """Register fake kernels and gradients, once, after the library is loaded."""
    torch.library.register_fake("qat::fake_quantize_forward", _fake_forward)
    torch.library.register_fake("qat::fake_quantize_observe_forward", _fake_observe_forward)
    torch.library.register_fake("qat::fake_quantize_backward", _fake_backward)
    torch.library.register_fake("qat::observe_minmax", _fake_extrema)
    torch.library.register_fake("qat::observe_histogram", _fake_histogram)
    if hasattr(torch.ops.qat, "int8_gemm"):  # schemas of a build with CUDA
        torch.library.register_fake("qat::int8_gemm", _fake_gemm)
        torch.library.register_fake("qat::int8_conv2d", _fake_conv2d)
    for name in ("qat::fake_quantize_forward", "qat::fake_quantize_observe_forward"):
        torch.library.register_autograd(name, _forward_gradient, setup_context=_keep_mask)
    torch.library.register_autograd("qat::fake_quantize_backward", _mask_gradient, setup_context=_keep_given_mask)


def _fake_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int = -1, with_mask: bool = True
) -> tuple[Tensor, Tensor]:
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        # one meta tensor among real ones comes here too, and must not get memory that nobody wrote
        if tensor.device != x.device:
            raise RuntimeError(f"qat: {name} is on {tensor.device} and x on {x.device}; give tensors of one device")
    size = (x.numel() + 7) // 8 if with_mask else 0
    return torch.empty_like(x), x.new_empty((size,), dtype=torch.uint8)


def _fake_observe_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int = -1, with_mask: bool = True
) -> tuple[Tensor, ...]:
    return (*_fake_forward(x, scale, zero_point, qmin, qmax, axis, with_mask), *_fake_extrema(x, axis))


def _fake_backward(grad: Tensor, mask_bits: Tensor, strides: list[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, strides)


def _fake_extrema(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    shape = () if axis == -1 else (x.shape[axis],)
    low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return low, high, x.new_empty((), dtype=torch.int64)


def _fake_histogram(x: Tensor, counts: Tensor, low: Tensor, high: Tensor, nonfinite: Tensor) -> None:
    return None


def _fake_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    y_signed: bool = False,
    *_: Any,
    **__: Any,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.int8 if y_signed else torch.uint8)


def _fake_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    y_signed: bool = False,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0, 0, 0),
    dilation: tuple[int, ...] = (1, 1),
    *_: Any,
    **__: Any,
) -> Tensor:
    out = [
        (x.shape[1 + d] + padding[d] + padding[2 + d] - dilation[d] * (weight.shape[1 + d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    ]
    return x.new_empty((x.shape[0], *out, weight.shape[0]), dtype=torch.int8 if y_signed else torch.uint8)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, mask_bits, *statistics = output
    ctx.mark_non_differentiable(mask_bits, *statistics)
    ctx.set_materialize_grads(False)
    if not inputs[6]:
        ctx.strides = None
        return
    ctx.save_for_backward(mask_bits)
    # the bits are in the order of memory of the output
    ctx.strides = y.stride()


def _forward_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    if ctx.strides is None:
        raise RuntimeError("qat: fake_quantize was called with with_mask=False and has no gradient; ask for the mask")
    (mask_bits,) = ctx.saved_tensors
    return torch.ops.qat.fake_quantize_backward(grad, mask_bits, ctx.strides), *((None,) * 6)


def _keep_given_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask_bits, ctx.strides = inputs
    ctx.save_for_backward(mask_bits)


def _mask_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask_bits,) = ctx.saved_tensors
    return torch.ops.qat.fake_quantize_backward(grad, mask_bits, ctx.strides), None, None
