"""Max, average and global average pooling, and the mean over any axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import PlanError
from qat.integer.kernels.accumulate import pad_spatial
from qat.integer.kernels.qparams import QParams, float32_scalar
from qat.integer.kernels.requantize import dequantize, quantize, requantize


def _each(value: int | Sequence[int], dims: int, name: str) -> list[int]:
    values = [value] * dims if isinstance(value, int) else list(value)
    if len(values) != dims:
        raise PlanError(f"{name} {values} for a pooling over {dims} dimensions", f"give {dims} values")
    return values


def _sides(padding: int | Sequence[int], dims: int) -> tuple[list[int], list[int]]:
    values = [padding] * dims if isinstance(padding, int) else list(padding)
    if len(values) == dims:
        return values, values
    return _each(values[:dims], dims, "padding"), _each(values[dims:], dims, "padding")


def pooled_size(size: int, kernel: int, stride: int, begin: int, end: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one dimension; none starts in the end padding, also with `ceil_mode`."""
    span = size + begin + end - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + begin:
        count -= 1
    return count


def max_pool(
    codes: Tensor,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling of the codes themselves (MaxPool on integers): the encoding is kept.

    Args:
        codes: Integer, shape (N, C, *spatial), 1 to 3 spatial dimensions.
        kernel: One value or one per dimension.
        stride: One value or one per dimension; the kernel if None.
        padding: One value, one per dimension, or ONNX order (begins, then ends). Padding never wins.
        dilation: One value or one per dimension.
        ceil_mode: Let the last window extend beyond the end.

    Returns:
        int32 codes, shape (N, C, *windows).
    """
    dims = codes.dim() - 2
    kernels, dilations = _each(kernel, dims, "kernel"), _each(dilation, dims, "dilation")
    strides = kernels if stride is None else _each(stride, dims, "stride")
    begins, ends = _sides(padding, dims)
    counts = [
        pooled_size(n, k, s, b, e, d, ceil_mode)
        for n, k, s, b, e, d in zip(codes.shape[2:], kernels, strides, begins, ends, dilations, strict=True)
    ]
    after = [
        max((c - 1) * s + d * (k - 1) + 1 - n - b, 0)
        for c, s, d, k, n, b in zip(counts, strides, dilations, kernels, codes.shape[2:], begins, strict=True)
    ]
    x = pad_spatial(codes.to(torch.float32), [*begins, *after], -math.inf)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dims - 1]
    y = pool(x, kernels, strides, 0, dilations)
    for d, count in enumerate(counts):
        y = y.narrow(2 + d, 0, count)
    return y.to(torch.int32)


def avg_pool(
    codes: Tensor,
    x: QParams,
    y: QParams,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Average pooling (QLinearAveragePool): dequantize, add in window order in float32, divide, requantize.

    The runtime adds the zero point before it rounds. The divisor is PyTorch's. The runtime's 8-bit kernel
    would always divide by the size of the kernel where padding counts, also where `ceil_mode` lets a window
    extend beyond the padding: such a pooling has to be exported with the padding as an operator of its own.

    Args:
        codes: Integer, shape (N, C, *spatial), 1 to 3 spatial dimensions.
        x: Parameters of the input.
        y: Parameters of the result.
        kernel: One value or one per dimension.
        stride: One value or one per dimension; the kernel if None.
        padding: One value, one per dimension, or ONNX order (begins, then ends).
        ceil_mode: Let the last window extend beyond the end.
        count_include_pad: Count padding as zeros; else divide by the number of real elements.

    Returns:
        int32 codes, shape (N, C, *windows).
    """
    dims = codes.dim() - 2
    kernels = _each(kernel, dims, "kernel")
    strides = kernels if stride is None else _each(stride, dims, "stride")
    begins, ends = _sides(padding, dims)
    sizes = list(codes.shape[2:])
    counts = [
        pooled_size(n, k, s, b, e, 1, ceil_mode)
        for n, k, s, b, e in zip(sizes, kernels, strides, begins, ends, strict=True)
    ]
    after = [
        max((c - 1) * s + k - n - b, 0) for c, s, k, n, b in zip(counts, strides, kernels, sizes, begins, strict=True)
    ]
    real = pad_spatial(dequantize(codes, x), [*begins, *after])
    # the order of the additions is the runtime's: the last dimension runs fastest
    total = torch.zeros([*codes.shape[:2], *counts], dtype=torch.float32, device=codes.device)
    for tap in itertools.product(*(range(k) for k in kernels)):
        window = tuple(slice(t, t + (c - 1) * s + 1, s) for t, c, s in zip(tap, counts, strides, strict=True))
        total = total + real[(slice(None), slice(None), *window)]
    # what a window covers, of the padded or of the bare input
    limits = [n + e for n, e in zip(sizes, ends, strict=True)] if count_include_pad else sizes
    firsts = [-b for b in begins] if count_include_pad else [0] * dims
    mean = total / _elements(firsts, limits, kernels, strides, begins, counts).to(codes.device)
    if x.wide or y.wide:
        return quantize(mean, y)
    steps = mean / float32_scalar(y.scale, codes) + float32_scalar(y.zero_point, codes)
    return torch.clamp(steps.round(), y.qmin, y.qmax).to(torch.int32)


def _elements(
    firsts: list[int],
    limits: list[int],
    kernels: list[int],
    strides: list[int],
    begins: list[int],
    counts: list[int],
) -> Tensor:
    """How many positions of `firsts` to `limits` each window covers, float32 of shape `counts`."""
    covered = torch.ones([], dtype=torch.int64)
    for first, limit, k, s, b, c in zip(firsts, limits, kernels, strides, begins, counts, strict=True):
        start = torch.arange(c) * s - b
        covered = covered[..., None] * (torch.clamp(start + k, max=limit) - torch.clamp(start, min=first))
    return covered.to(torch.float32)


def reduce_mean(codes: Tensor, x: QParams, y: QParams, axes: Sequence[int], keepdims: bool = False) -> Tensor:
    """Mean over axes, as QLinearGlobalAveragePool: the exact sum by `x.scale / (y.scale * count)`.

    A ReduceMean node would be computed in float by the runtime; the exporter writes Transpose, Reshape,
    GlobalAveragePool, Reshape instead.

    Args:
        codes: Integer, any shape.
        x: Parameters of the input.
        y: Parameters of the result.
        axes: The axes to average over.
        keepdims: Keep them with size 1.

    Returns:
        int32 codes.
    """
    reduced = [a % codes.dim() for a in axes]
    count = math.prod(codes.shape[a] for a in reduced)
    acc = (codes.to(torch.int64) - x.zero_point).sum(reduced, keepdim=keepdims)
    if x.wide or y.wide:
        return quantize((acc.double() * x.scale / count).to(torch.float32), y)
    factor = float32_scalar(x.scale, codes) / (float32_scalar(y.scale, codes) * float32_scalar(float(count), codes))
    return requantize(acc, factor, y)


def global_avg_pool(codes: Tensor, x: QParams, y: QParams) -> Tensor:
    """Global average pooling (QLinearGlobalAveragePool): (N, C, *spatial) to (N, C, 1, ...), int32."""
    return reduce_mean(codes, x, y, range(2, codes.dim()), keepdims=True)
