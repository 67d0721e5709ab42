"""Exact integer accumulation on top of PyTorch's floating-point convolutions and products.

A sum of integer products is exact in floating point as long as no partial sum can leave the range in which
every integer is representable: 2**24 in float32, 2**53 in float64. The bound is proven from the actual
weights and the actual largest activation. When float32 does not suffice the reduction is split along the
input channels into parts that do, and the parts are added as integers; float64 is the last resort.
Reduced-precision modes (bfloat16, TF32) and NNPACK, whose Winograd transform is inexact, are switched off
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import ExportError, PlanError

_FLOAT32_EXACT = 2**24
_FLOAT64_EXACT = 2**53
#: Above this many parts a single float64 pass is cheaper.
_MOST_PARTS = 12


@contextmanager
def _ieee_float() -> Iterator[None]:
    conv, matmul = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    with torch.backends.nnpack.flags(enabled=False):
        conv.fp32_precision = matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            conv.fp32_precision, matmul.fp32_precision = before


def _largest(x: Tensor) -> int:
    return int(x.abs().max()) if x.numel() else 0


@dataclass(frozen=True)
class Plan:
    """How a product with a fixed weight is computed exactly; made once, used for every input.

    Attributes:
        parts: Ranges of the reduced axis with the weight there, in the type that adds it exactly. One part is the
            whole.
        bound: Largest magnitude that an accumulator can reach.
    """

    parts: tuple[tuple[int, int, Tensor], ...]
    bound: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic."""
        return self.parts[0][2].dtype


def _plan(w: Tensor, axis: int, sums: Tensor, largest: int, divisible: bool) -> Plan:
    """Plan the reduction over `axis` of `w`; `sums` is float64, shape (outputs, reduced): sums of |w|."""
    bound = (int(sums.sum(1).max()) if sums.numel() else 0) * largest
    if bound >= _FLOAT64_EXACT:
        raise ExportError(f"an accumulator may reach {bound}, beyond exact float64", "use narrower codes")
    length = w.shape[axis]
    if bound < _FLOAT32_EXACT:
        return Plan(((0, length, w.to(torch.float32)),), bound)
    cuts = _parts(sums, largest) if divisible else None
    if cuts is None:
        return Plan(((0, length, w.double()),), bound)
    return Plan(tuple((i, j, w.narrow(axis, i, j - i).to(torch.float32)) for i, j in pairwise(cuts)), bound)


def plan_conv(w: Tensor, largest: int, groups: int = 1, transposed: bool = False) -> Plan:
    """Plan a convolution.

    Args:
        w: Integer weights with the zero point already subtracted, laid out as for `conv_accumulate`.
        largest: Largest |code - zero point| of the activation.
        groups: Number of groups.
        transposed: Transposed convolution.

    Raises:
        ExportError: Operands so large that float64 is not exact.
    """
    magnitude = w.abs().double()
    if transposed:
        per_input = magnitude.flatten(2).sum(2).reshape(groups, w.shape[0] // groups, w.shape[1])
        sums = per_input.transpose(1, 2).flatten(0, 1)
    else:
        sums = magnitude.flatten(2).sum(2)
    return _plan(w, 0 if transposed else 1, sums, largest, groups == 1)


def plan_linear(w: Tensor, largest: int) -> Plan:
    """Plan `x @ w.T`; arguments and errors as for `plan_conv`, `w` of shape (N, K)."""
    return _plan(w, 1, w.abs().double(), largest, True)


def _as_integer(acc: Tensor, bound: int) -> Tensor:
    return acc.to(torch.int32 if bound < 2**31 else torch.int64)


def _parts(weight_sums: Tensor, largest: int) -> list[int] | None:
    """Boundaries of parts of the reduced axis that float32 adds exactly; None if there are too many.

    Args:
        weight_sums: float64, shape (outputs, reduced): sums of |w|.
        largest: Largest |activation|.
    """
    budget = (_FLOAT32_EXACT - 1) // max(largest, 1)
    running = weight_sums.cumsum(1)
    cuts = [0]
    base = torch.zeros(weight_sums.shape[0], dtype=torch.float64, device=weight_sums.device)
    while cuts[-1] < weight_sums.shape[1]:
        fits = ((running - base[:, None]).amax(0) <= budget).sum()
        end = int(fits)
        if end <= cuts[-1] or len(cuts) > _MOST_PARTS:
            return None
        cuts.append(end)
        base = running[:, end - 1]
    return cuts


def _spatial(value: int | Sequence[int], dims: int, name: str) -> list[int]:
    values = [value] * dims if isinstance(value, int) else list(value)
    if len(values) != dims:
        raise PlanError(f"{name} {values} for a convolution over {dims} dimensions", f"give {dims} values")
    return values


def pad_spatial(x: Tensor, padding: int | Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the spatial dimensions with a constant.

    Args:
        x: Shape (N, C, *spatial).
        padding: One value; one per spatial dimension; or begin and end of each, ONNX order
            (begin_0, begin_1, ..., end_0, end_1, ...).
        value: What to pad with.

    Raises:
        PlanError: Another number of values.
    """
    dims = x.dim() - 2
    values = [padding] * dims if isinstance(padding, int) else list(padding)
    if len(values) == dims:
        values = values * 2
    if len(values) != 2 * dims:
        raise PlanError(f"padding {values} for {dims} spatial dimensions", f"give 1, {dims} or {2 * dims} values")
    if not any(values):
        return x
    flat = [side for d in reversed(range(dims)) for side in (values[d], values[dims + d])]
    return functional.pad(x, flat, value=value)


def conv_accumulate(
    x_codes: Tensor,
    x_zero_point: int,
    w_codes: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    w_zero_point: int = 0,
    plan: Plan | None = None,
) -> Tensor:
    """Exact `conv(x - x_zero_point, w - w_zero_point)` in 1, 2 or 3 dimensions; padding contributes zero.

    Args:
        x_codes: Integer, shape (N, C_in, *spatial).
        x_zero_point: Zero point of `x_codes`.
        w_codes: Integer, shape (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if
            `transposed`.
        stride: One value or one per dimension.
        padding: One value, one per dimension, or ONNX order (begins, then ends) for asymmetric padding. For a
            transposed convolution, what is cropped from the full result.
        dilation: One value or one per dimension.
        groups: Number of groups.
        transposed: Transposed convolution.
        output_padding: Extra size at the end of each dimension of a transposed convolution.
        w_zero_point: Zero point of `w_codes`.
        plan: What `plan_conv` gave for this weight and for any activation at least as large; else it is made here,
            for the codes at hand.

    Returns:
        int32 accumulators, or int64 where the bound of the actual operands exceeds 2**31; shape (N, C_out,
        *spatial).

    Raises:
        PlanError: Arguments for another number of dimensions.
        ExportError: Operands so large that float64 is not exact.
    """
    dims = x_codes.dim() - 2
    strides, dilations = _spatial(stride, dims, "stride"), _spatial(dilation, dims, "dilation")
    extra = _spatial(output_padding, dims, "output padding")
    x = _centred(x_codes, x_zero_point)
    if plan is None:
        plan = plan_conv(w_codes.to(torch.int32) - w_zero_point, _largest(x), groups, transposed)
    x = x.to(plan.dtype)
    shared = _same_on_both_sides(padding, dims)
    inside: int | tuple[int, ...] = 0 if shared is None else shared
    if not transposed and shared is None:
        x = pad_spatial(x, padding)

    def run(x_part: Tensor, w_part: Tensor) -> Tensor:
        if transposed:
            return _conv_transpose(x_part, w_part, strides, padding, extra, groups, dilations)
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return conv(x_part, w_part, None, strides, inside, dilations, groups)

    with _ieee_float():
        return _total((run(x[:, i:j] if len(plan.parts) > 1 else x, w) for i, j, w in plan.parts), plan.bound)


def _centred(codes: Tensor, zero_point: int) -> Tensor:
    """`codes - zero_point` in float32, which is exact for 24 bits."""
    x = codes.to(torch.float32, copy=True)
    return x.sub_(zero_point) if zero_point else x


def _total(parts: Iterable[Tensor], bound: int) -> Tensor:
    """The sum of partial results, in integers."""
    total: Tensor | None = None
    for part in parts:
        whole = _as_integer(part, bound)
        total = whole if total is None else total.add_(whole)
    assert total is not None
    return total


def _same_on_both_sides(padding: int | Sequence[int], dims: int) -> int | tuple[int, ...] | None:
    """The padding as PyTorch's convolutions take it, or None where begin and end differ."""
    if isinstance(padding, int):
        return padding
    values = tuple(padding)
    if len(values) == 2 * dims:
        return values[:dims] if values[:dims] == values[dims:] else None
    return values if len(values) == dims else None


def _conv_transpose(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: int | Sequence[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    dims = x.dim() - 2
    op = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[dims - 1]
    crop = [padding] * dims if isinstance(padding, int) else list(padding)
    begins, ends = (crop, crop) if len(crop) == dims else (crop[:dims], crop[dims:])
    if len(begins) != dims or len(ends) != dims:
        raise PlanError(f"padding {crop} for {dims} spatial dimensions", f"give 1, {dims} or {2 * dims} values")
    # the full result with the output padding appended, then cropped: allows any padding on either side
    y = op(x, w, None, stride, 0, 0, groups, dilation)
    flat = [side for d in reversed(range(dims)) for side in (-begins[d], output_padding[d] - ends[d])]
    return functional.pad(y, flat)


def linear_accumulate(x_codes: Tensor, x_zero_point: int, plan: Plan) -> Tensor:
    """Exact `(x - x_zero_point) @ w.T` for the weight that was planned by `plan_linear`.

    Args:
        x_codes: Integer, shape (*, K).
        x_zero_point: Zero point of `x_codes`.
        plan: The weight, planned for activations at least as large.

    Returns:
        int32, or int64 where the bound exceeds 2**31; shape (*, N).
    """
    x = _centred(x_codes, x_zero_point).to(plan.dtype)
    with _ieee_float():
        return _total((functional.linear(x[..., i:j], w) for i, j, w in plan.parts), plan.bound)


def matmul_accumulate(a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int) -> Tensor:
    """Exact `(a - a_zero_point) @ (b - b_zero_point)` with any batch dimensions, which broadcast.

    Args:
        a: Integer, shape (*, M, K).
        a_zero_point: Zero point of `a`.
        b: Integer, shape (*, K, N).
        b_zero_point: Zero point of `b`.

    Returns:
        int32, or int64 where the bound of the actual operands exceeds 2**31; shape (*, M, N).

    Raises:
        ExportError: Operands so large that float64 is not exact.
    """
    left, right = _centred(a, a_zero_point), _centred(b, b_zero_point)
    depth = left.shape[-1]
    largest = _largest(left)
    quick = depth * largest * _largest(right)
    if quick < _FLOAT32_EXACT:
        with _ieee_float():
            return _as_integer(left @ right, quick)
    # columns of every batch as rows: the parts must suit them all
    sums = right.abs().double().transpose(-1, -2).reshape(-1, depth)
    plan = _plan(right, right.dim() - 2 if right.dim() > 1 else 0, sums, largest, True)
    with _ieee_float():
        return _total((left[..., i:j].to(plan.dtype) @ w for i, j, w in plan.parts), plan.bound)


def accumulator_bound(
    w_codes: Tensor,
    x_zero_point: int,
    x_qmin: int,
    x_qmax: int,
    bias_codes: Tensor | None = None,
    channel_axis: int = 0,
    groups: int = 1,
) -> Tensor:
    """Largest magnitude that each output channel's accumulator can reach, whatever the input.

    The bound is tight (some input attains it) and holds for every partial sum in any order, since each
    product's range contains zero. Bias may be added first or last.

    Args:
        w_codes: Integer weights with the zero point already subtracted.
        x_zero_point: Zero point of the activation.
        x_qmin: Smallest activation code.
        x_qmax: Largest activation code.
        bias_codes: Integer, shape (output channels,).
        channel_axis: Axis of `w_codes` of the output channels: 0, or 1 for a transposed convolution.
        groups: Groups of a transposed convolution, whose weight has C_out / groups channels on axis 1.

    Returns:
        int64, shape (output channels,). The accumulator fits 32 bits where it is at most 2**31 - 1.
    """
    w = w_codes.to(torch.int64)
    if channel_axis % w.dim() == 0:
        rows = w.reshape(w.shape[0], -1)
    else:
        rows = w.movedim(channel_axis, 1).reshape(groups, w.shape[0] // groups, w.shape[channel_axis], -1)
        rows = rows.transpose(1, 2).reshape(groups * w.shape[channel_axis], -1)
    low, high = min(x_qmin - x_zero_point, 0), max(x_qmax - x_zero_point, 0)
    upper = torch.maximum(rows * low, rows * high).sum(1)
    lower = torch.minimum(rows * low, rows * high).sum(1)
    if bias_codes is not None:
        bias = bias_codes.to(torch.int64)
        upper, lower = upper + bias.clamp(min=0), lower + bias.clamp(max=0)
    return torch.maximum(upper, -lower)
