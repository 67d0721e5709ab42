"""Convolution, transposed convolution, fully connected layer and matrix product.

With 8-bit activations these are ONNX Runtime's QLinearConv, QGemm and QLinearMatMul, code by code. With
16-bit activations, and for a ConvTranspose node, the runtime dequantizes and computes in float; see
`requantize_wide`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.integer.kernels.accumulate import (
    Plan,
    conv_accumulate,
    linear_accumulate,
    matmul_accumulate,
    plan_linear,
)
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier, requantize, requantize_wide


def largest(x: QParams) -> int:
    """Largest |code - zero point| of an activation: what weights are planned for."""
    return max(x.qmax - x.zero_point, x.zero_point - x.qmin)


def _finish(
    acc: Tensor,
    bias_codes: Tensor | None,
    x: QParams,
    w_scale: float | Tensor,
    y: QParams,
    axis: int,
    in_float: bool,
) -> Tensor:
    if bias_codes is not None:
        axis %= acc.dim()
        shape = [-1 if d == axis else 1 for d in range(acc.dim())]
        # the sum may leave int32 only where the runtime's would too; that is excluded at export
        acc = acc.add_(bias_codes.to(acc.device).reshape(shape))
    if in_float:
        return requantize_wide(acc, x.scale, w_scale, y, axis)
    return requantize(acc, multiplier(x.scale, w_scale, y.scale), y, axis)


def conv(
    x_codes: Tensor,
    x: QParams,
    w_codes: Tensor,
    w_scale: float | Tensor,
    bias_codes: Tensor | None,
    y: QParams,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    w_zero_point: int = 0,
    plan: Plan | None = None,
) -> Tensor:
    """Quantized convolution in 1, 2 or 3 dimensions (QLinearConv).

    Args:
        x_codes: Integer, shape (N, C_in, *spatial).
        x: Parameters of the input.
        w_codes: Integer, shape (C_out, C_in / groups, *kernel).
        w_scale: Scale of the weight: one, or float32 of shape (C_out,).
        bias_codes: int32 of shape (C_out,) with scale `x.scale * w_scale`, or None.
        y: Parameters of the result. A fused ReLU or clip is a narrower `qmin`, `qmax`.
        stride: One value or one per dimension.
        padding: One value, one per dimension, or ONNX order (begins, then ends).
        dilation: One value or one per dimension.
        groups: Number of groups.
        w_zero_point: Zero point of the weight.
        plan: The weight prepared by `plan_conv`, see `largest`.

    Returns:
        int32 codes, shape (N, C_out, *spatial).
    """
    acc = conv_accumulate(
        x_codes, x.zero_point, w_codes, stride, padding, dilation, groups, w_zero_point=w_zero_point, plan=plan
    )
    return _finish(acc, bias_codes, x, w_scale, y, 1, x.wide or y.wide)


def conv_transpose(
    x_codes: Tensor,
    x: QParams,
    w_codes: Tensor,
    w_scale: float | Tensor,
    bias_codes: Tensor | None,
    y: QParams,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    in_float: bool = True,
    plan: Plan | None = None,
) -> Tensor:
    """Quantized transposed convolution.

    ONNX Runtime has no integer kernel for a ConvTranspose node: it computes in float (`in_float`). Written as
    a convolution with `subpixel_weights` it becomes a QLinearConv, and the codes are exact
    (`in_float=False`).

    Args:
        x_codes: Integer, shape (N, C_in, *spatial).
        x: Parameters of the input.
        w_codes: Integer, shape (C_in, C_out / groups, *kernel).
        w_scale: Scale of the weight: one, or float32 of shape (C_out,).
        bias_codes: int32 of shape (C_out,) with scale `x.scale * w_scale`, or None.
        y: Parameters of the result.
        stride: One value or one per dimension.
        padding: One value, one per dimension, or ONNX order (begins, then ends).
        output_padding: One value or one per dimension.
        dilation: One value or one per dimension.
        groups: Number of groups.
        in_float: The exported node is a ConvTranspose.
        plan: The weight prepared by `plan_conv`, see `largest`.

    Returns:
        int32 codes, shape (N, C_out, *spatial).
    """
    acc = conv_accumulate(
        x_codes,
        x.zero_point,
        w_codes,
        stride,
        padding,
        dilation,
        groups,
        transposed=True,
        output_padding=output_padding,
        plan=plan,
    )
    return _finish(acc, bias_codes, x, w_scale, y, 1, in_float or x.wide or y.wide)


def linear(
    x_codes: Tensor,
    x: QParams,
    w_codes: Tensor,
    w_scale: float | Tensor,
    bias_codes: Tensor | None,
    y: QParams,
    plan: Plan | None = None,
) -> Tensor:
    """Quantized fully connected layer (QGemm; Reshape, Gemm, Reshape for more than two dimensions).

    Args:
        x_codes: Integer, shape (*, K).
        x: Parameters of the input.
        w_codes: Integer, shape (N, K), zero point 0.
        w_scale: Scale of the weight: one, or float32 of shape (N,).
        bias_codes: int32 of shape (N,) with scale `x.scale * w_scale`, or None.
        y: Parameters of the result.
        plan: The weight prepared by `plan_linear`, see `largest`.

    Returns:
        int32 codes, shape (*, N).
    """
    acc = linear_accumulate(x_codes, x.zero_point, plan or plan_linear(w_codes.to(torch.int32), largest(x)))
    return _finish(acc, bias_codes, x, w_scale, y, -1, x.wide or y.wide)


def linear_per_group(x_codes: Tensor, x: QParams, w_codes: Tensor, encoding: Encoding) -> Tensor:
    """Fully connected layer with one weight scale for each group of input features, without bias.

    ONNX Runtime computes this in float from blocked DequantizeLinear. Here the sums within a group are exact
    integers and their combination is rounded once.

    Args:
        x_codes: Integer, shape (*, K).
        x: Parameters of the input.
        w_codes: Integer, shape (N, K).
        encoding: Per-group encoding of the weight along axis 1.

    Returns:
        Real values, float32, shape (*, N).
    """
    depth = w_codes.shape[1]
    size = encoding.granularity.size or depth
    count = -(-depth // size)
    scale = encoding.scale_tensor.to(x_codes.device).reshape(-1, count)
    zero = encoding.zero_point_tensor.to(x_codes.device).reshape(-1, count)
    pad = (0, count * size - depth)
    left = torch.nn.functional.pad((x_codes.to(torch.int32) - x.zero_point).reshape(-1, depth), pad)
    centred = w_codes.to(torch.int32) - zero.repeat_interleave(size, 1)[:, :depth]
    right = torch.nn.functional.pad(centred, pad).reshape(-1, count, size)
    sums = matmul_accumulate(left.reshape(-1, count, size).transpose(0, 1), 0, right.permute(1, 2, 0), 0)
    real = (sums.double() * scale.t()[:, None, :].double()).sum(0) * x.scale
    return real.to(torch.float32).reshape(*x_codes.shape[:-1], -1)


def matmul(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized product of two activations (QLinearMatMul).

    Args:
        a_codes: Integer, shape (*, M, K).
        a: Parameters of the left operand.
        b_codes: Integer, shape (*, K, N).
        b: Parameters of the right operand.
        y: Parameters of the result.

    Returns:
        int32 codes, shape (*, M, N), batch dimensions broadcast.
    """
    acc = matmul_accumulate(a_codes, a.zero_point, b_codes, b.zero_point)
    return _finish(acc, None, a, b.scale, y, -1, a.wide or b.wide or y.wide)


def subpixel_weights(w_codes: Tensor, stride: Sequence[int], groups: int = 1) -> Tensor:
    """Weight of the convolution that gives every phase of a transposed convolution.

    A transposed convolution of stride s is s**d ordinary convolutions, one for each phase of the output,
    interleaved. With m = ceil(kernel / stride) taps a phase, the equivalent graph is: Conv with this weight,
    stride 1 and padding m - 1 on all sides; DepthToSpace (mode CRD, two
    dimensions) or Reshape and Transpose so that the phases interleave; Slice to crop the padding.

    Args:
        w_codes: Integer, shape (C_in, C_out / groups, *kernel).
        stride: One per dimension.
        groups: Number of groups.

    Returns:
        Shape (C_out * prod(stride), C_in / groups, *m), channel order (output channel, then phase, last
        dimension fastest), dtype of `w_codes`.
    """
    kernel = w_codes.shape[2:]
    dims = len(kernel)
    taps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    flat = [side for d in reversed(range(dims)) for side in (0, taps[d] * stride[d] - kernel[d])]
    w = torch.nn.functional.pad(w_codes, flat)
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], *(n for d in range(dims) for n in (taps[d], stride[d])))
    # (g, in, out, m0, s0, m1, s1, ...) to (g, out, s0, s1, ..., in, m0, m1, ...)
    w = w.permute(0, 2, *(4 + 2 * d for d in range(dims)), 1, *(3 + 2 * d for d in range(dims)))
    w = w.reshape(-1, w_codes.shape[0] // groups, *taps)
    return w.flip(list(range(2, 2 + dims)))
