"""Padding and concatenation of quantized tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import quantize, requantize_codes


def pad(
    codes: Tensor,
    x: QParams,
    padding: Sequence[int],
    mode: Literal["constant", "reflect", "replicate"] = "constant",
    value: float = 0.0,
) -> Tensor:
    """Pad between DequantizeLinear and QuantizeLinear of one encoding, which leaves every code as it is.

    Args:
        codes: Integer, any shape.
        x: Parameters of input and result.
        padding: PyTorch order: (begin, end) of the last axis, then of the one before, and so on.
        mode: PyTorch's name; `replicate` is ONNX's `edge`.
        value: Real value of constant padding, quantized with `x`.

    Returns:
        int32 codes.
    """
    if mode == "constant":
        fill = int(quantize(torch.tensor(value), x))
        return functional.pad(codes.to(torch.int32), list(padding), value=fill)
    return functional.pad(codes.to(torch.float32), list(padding), mode=mode).to(torch.int32)


def concat(parts: Sequence[tuple[Tensor, QParams]], y: QParams, axis: int) -> Tensor:
    """Concatenate codes (QLinearConcat): other encodings are requantized, equal ones copied.

    Args:
        parts: Codes with their parameters.
        y: Parameters of the result.
        axis: The axis to join along.

    Returns:
        int32 codes.
    """
    return torch.cat([requantize_codes(codes, q, y) for codes, q in parts], axis)
