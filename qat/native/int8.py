"""The 8-bit product and convolution of a build with CUDA: what torch must know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Register fake kernels, once, after the library is loaded; a build without CUDA has no such operators."""
    if hasattr(torch.ops.qat, "int8_gemm"):
        torch.library.register_fake("qat::int8_gemm", _fake_gemm)
        torch.library.register_fake("qat::int8_conv2d", _fake_conv2d)


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
