"""Fake quantization on a given grid, and what all native operators share.

The functions of this package need `qat.native.status().runs_on(device)`. They take tensors of float32 or bfloat16
(computed in float32) in any layout; dense ones, such as contiguous and channels_last, are read in place. The tensors of
a call are on one device. Results have the same bits in every run, and on the CPU for every number of threads and every
instruction set. Errors are RuntimeError with the cause.
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
    operator = torch.ops.qat.fake_quantize_forward.default
    return straight_through(operator, x, scale, zero_point, qmin, qmax, axis_of(x, axis))


def axis_of(x: Tensor, axis: int | None) -> int:
    """Return the axis as the operators want it: not negative, or -1 for per-tensor."""
    if axis is None:
        return -1
    return axis + x.dim() if -x.dim() <= axis < 0 else axis if axis >= 0 else x.dim()


def straight_through(operator: Any, x: Tensor, *arguments: Any) -> Tensor:
    """Return what an operator makes of `x`, with the gradient straight through the range mask that it also returns.

    A gradient that is registered with the operator does the same, where there is one (an operator that changes its
    arguments has none), but takes five times as long to call, which shows in networks of small layers.

    Args:
        operator: Of torch.ops.qat; its last argument asks for the mask.
        x: Its first argument, the only one that gets a gradient.
        arguments: The others, without the last one.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _StraightThrough.apply(x, operator, arguments)  # type: ignore[no-untyped-call]
        return out
    result: Tensor = below_autograd(operator, x, *arguments, False)[0]
    return result


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator whose gradient somebody else takes care of."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Any, arguments: tuple[Any, ...]) -> Tensor:
        y: Tensor
        made: tuple[Tensor, Tensor] = below_autograd(operator, x, *arguments, True)
        y, mask_bits = made
        # a grid that follows its tensor clamps nothing: then the gradient is that of the output, without a pass over
        # it; on a GPU the question would make the host wait
        can_ask = mask_bits.device.type == "cpu" and not torch.compiler.is_compiling()
        ctx.is_open = can_ask and torch.ops.qat._all_set(mask_bits, x.numel())
        if not ctx.is_open:
            ctx.save_for_backward(mask_bits)
        # the bits are in the order of memory of the output
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_open:
            return grad, None, None
        (mask_bits,) = ctx.saved_tensors
        operator = torch.ops.qat.fake_quantize_backward.default
        if torch.is_grad_enabled():  # the gradient is to have a gradient
            return operator(grad, mask_bits, ctx.strides), None, None
        return below_autograd(operator, grad, mask_bits, ctx.strides), None, None


def register() -> None:
    """Register fake kernels and gradients, once, after the library is loaded."""
    torch.library.register_fake("qat::fake_quantize_forward", fake_forward)
    torch.library.register_fake("qat::fake_quantize_backward", _fake_backward)
    torch.library.register_autograd("qat::fake_quantize_forward", _forward_gradient, setup_context=_keep_mask)
    torch.library.register_autograd("qat::fake_quantize_backward", _mask_gradient, setup_context=_keep_given_mask)


def fake_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int = -1, with_mask: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what the shapes of a fake-quantized tensor and its mask are, for fake kernels."""
    one_device(x, scale=scale, zero_point=zero_point)
    size = (x.numel() + 7) // 8 if with_mask else 0
    return torch.empty_like(x), x.new_empty((size,), dtype=torch.uint8)


def one_device(x: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors of another device than `x` has, in fake kernels.

    One meta tensor among real ones comes there too, and must not get memory that nobody wrote.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"qat: {name} is on {tensor.device} and x on {x.device}; give tensors of one device")


def _fake_backward(grad: Tensor, mask_bits: Tensor, strides: list[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, strides)


def fake_extrema(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the shapes of minima, maxima and the count of other values are, for fake kernels."""
    shape = () if axis == -1 else (x.shape[axis],)
    low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return low, high, x.new_empty((), dtype=torch.int64)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask_bits = output
    ctx.mark_non_differentiable(mask_bits)
    ctx.set_materialize_grads(False)
    if not inputs[6]:
        ctx.strides = None
        return
    ctx.save_for_backward(mask_bits)
    # the bits are in the order of memory of the output
    ctx.strides = y.stride()


def _forward_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
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
