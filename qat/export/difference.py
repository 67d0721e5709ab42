"""How far an exported model's execution is from the simulation, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qat import numerics
from qat.encoding import Encoding
from qat.errors import VerificationError
from qat.scheme import INT_TYPES, int_type

Level = Literal["outputs", "layers"]

#: this few unequal codes are never held against the share: among a handful of codes one rounding tie is a
#: large share
FEW_CODES = 4
#: a float tensor has no codes of its own: it is compared on the grid of this many steps over its largest
#: magnitude
FLOAT_STEPS = 255.0


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor of the exported model is from the simulation, over all samples.

    Attributes:
        name: The user's tensor name.
        dtype: Integer type of the codes, or `float32` for a tensor without an encoding.
        count: Number of elements compared.
        max_difference: Largest difference in codes; for a float tensor in 255ths of its largest magnitude.
        unequal: Number of elements whose codes differ (float: by more than half a step).
    """

    name: str
    dtype: str
    count: int
    max_difference: float
    unequal: int

    @property
    def unequal_share(self) -> float:
        """Share of unequal elements, 0 to 1."""
        return self.unequal / self.count if self.count else 0.0

    @property
    def fineness(self) -> int:
        """Codes of this tensor in one code of 8 bits: 256 at 16 bits, else 1."""
        return 1 << max(int_type(self.dtype).bits - 8, 0) if self.dtype in INT_TYPES else 1

    def within(self, bound: float, unequal_share: float | None = None) -> bool:
        """Whether no difference exceeds `bound`, and at most a share of the elements (or 4) differ.

        A 16-bit tensor may differ by 256 times the bound, in as many elements as it likes: ONNX Runtime has no
        16-bit kernels and computes in float32, whose rounding shows in the last of 16 bits once the layers have
        amplified it. The bound so means the same share of a tensor's range at every width.
        """
        if self.fineness > 1:
            return self.max_difference <= bound * self.fineness
        allowed = math.inf if unequal_share is None else max(unequal_share * self.count, FEW_CODES)
        return self.max_difference <= bound and self.unequal <= allowed


@dataclass(frozen=True)
class Verification:
    """The comparison of an exported model with the simulation.

    Attributes:
        runtime: Name and version of the runtime.
        level: `outputs`, or `layers` where every quantized tensor was compared.
        samples: Number of samples executed.
        tensors: The differences, graph outputs first, then in execution order.
        options: Session entries that the runtime was given, `key=value`.
    """

    runtime: str
    level: Level
    samples: int
    tensors: tuple[TensorDifference, ...]
    options: tuple[str, ...] = ()

    @property
    def worst(self) -> TensorDifference:
        """The tensor with the largest difference in 8-bit codes (among equals, the largest unequal share)."""
        return max(self.tensors, key=_badness)

    def failures(self, bound: float = 1.0, unequal_share: float | None = None) -> tuple[TensorDifference, ...]:
        """The tensors that are not within the bounds, worst first."""
        failed = [t for t in self.tensors if not t.within(bound, unequal_share)]
        return tuple(sorted(failed, key=_badness, reverse=True))

    def ok(self, bound: float = 1.0, unequal_share: float | None = None) -> bool:
        """Whether every tensor is within the bounds."""
        return not self.failures(bound, unequal_share)

    def __str__(self) -> str:
        rows = [("tensor", "dtype", "elements", "largest difference", "unequal")]
        rows += [
            (
                t.name,
                t.dtype,
                str(t.count),
                f"{t.max_difference:g}",
                f"{t.unequal} ({100 * t.unequal_share:.4g} %)",
            )
            for t in self.tensors
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.runtime}, {self.samples} samples, compared: {self.level}", *lines])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this record."""
        return {
            "runtime": self.runtime,
            "level": self.level,
            "options": list(self.options),
            "samples": self.samples,
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.dtype,
                    "count": t.count,
                    "max_difference": t.max_difference,
                    "unequal": t.unequal,
                    "unequal_share": t.unequal_share,
                }
                for t in self.tensors
            ],
        }


def _badness(tensor: TensorDifference) -> tuple[float, float]:
    return (tensor.max_difference / tensor.fineness, tensor.unequal_share)


class Tally:
    """Running comparison of one tensor.

    Args:
        name: The user's tensor name.
        encoding: Of its codes, or None for a float tensor.
    """

    def __init__(self, name: str, encoding: Encoding | None) -> None:
        self.name = name
        self.encoding = encoding
        self.count = self.unequal = 0
        self.largest = 0.0

    def add(self, runtime: Tensor, simulated: Tensor) -> None:
        """Compare one batch: codes where the tensor has an encoding, floats elsewhere."""
        if runtime.shape != simulated.shape:
            raise VerificationError(
                f"tensor {self.name!r} has shape {tuple(runtime.shape)} in the runtime and "
                f"{tuple(simulated.shape)} in the simulation",
                "this is a defect of the export: report the model",
            )
        if not runtime.numel():
            return
        if self.encoding is not None:
            difference = (runtime.to(torch.int64) - simulated.to(torch.int64)).abs().to(torch.float64)
            unequal = difference > 0
        else:
            difference = _float_difference(runtime, simulated)
            unequal = difference > 0.5
        self.count += runtime.numel()
        self.unequal += int(unequal.sum())
        self.largest = max(self.largest, float(difference.max()))

    def result(self) -> TensorDifference:
        """The comparison so far."""
        dtype = self.encoding.dtype if self.encoding is not None else "float32"
        return TensorDifference(self.name, dtype, self.count, self.largest, self.unequal)


def _float_difference(runtime: Tensor, simulated: Tensor) -> Tensor:
    a, b = runtime.to(torch.float64), simulated.to(torch.float64)
    finite = b[torch.isfinite(b)]
    step = float(finite.abs().max()) / FLOAT_STEPS if finite.numel() else 0.0
    # equal infinities and equal nans are equal; a finite value against one of them is infinitely far
    difference = torch.nan_to_num((a - b).abs(), nan=math.inf, posinf=math.inf)
    difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return difference / (step or 1.0)


def codes_of(value: Tensor, encoding: Encoding | None) -> Tensor:
    """Codes of a dequantized value, int64.

    Dividing `(q - z) * s` by `s` gives `q - z` again, at 16 bits and fewer. Nothing is clamped: a value
    outside the encoding's range is a difference to be seen.
    """
    if encoding is None:
        return value
    scale = numerics.expand_to(encoding.scale_tensor, value, encoding.granularity)
    zero_point = numerics.expand_to(encoding.zero_point_tensor, value, encoding.granularity)
    steps = torch.nan_to_num(
        torch.round(value.to(torch.float64) / scale), nan=2.0**40, posinf=2.0**40, neginf=-(2.0**40)
    )
    return steps.to(torch.int64) + zero_point
