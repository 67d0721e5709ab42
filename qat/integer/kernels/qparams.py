"""Quantization parameters of one tensor, and exact float32 scalars."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qat.errors import EncodingError


def round_to_float32(value: float) -> float:
    """The float32 nearest to `value`, as a Python float; infinite when it is out of float32's range."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def float32_scalar(value: float, like: Tensor) -> Tensor:
    """`value` as float32 of shape () on the device of `like`, so that no operation runs in double."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class QParams:
    """Per-tensor quantization parameters: `real = scale * (code - zero_point)`, `qmin <= code <= qmax`.

    The range may be narrower than the one of the dtype that stores the codes. The scale is rounded to float32
    on construction, since every runtime stores it so.

    Attributes:
        scale: Real value of one step.
        zero_point: Code of 0.
        qmin: Smallest code.
        qmax: Largest code.
        float_reader: Whatever reads the codes computes in float, whatever their range: those of 4-bit tensors, for
            which ONNX Runtime has no integer kernel.

    Raises:
        EncodingError: A scale that is not positive and finite, an empty range, or a zero point outside the
            range.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    float_reader: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        scale = round_to_float32(self.scale)
        if not (math.isfinite(scale) and scale > 0):
            raise EncodingError(
                f"scale {self.scale} is not positive and finite in float32", "calibrate the tensor again"
            )
        if not self.qmin <= self.zero_point <= self.qmax:
            raise EncodingError(
                f"zero point {self.zero_point} outside [{self.qmin}, {self.qmax}]",
                "choose one inside, so that 0 is exact",
            )
        object.__setattr__(self, "scale", scale)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1

    @property
    def wide(self) -> bool:
        """Whether ONNX Runtime has no integer kernel for the codes: more than 8 bits, or a `float_reader`."""
        return self.float_reader or self.qmin < -128 or self.qmax > 255 or self.levels > 256
