"""The result of quantizing one tensor: `Encoding`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qat import numerics
from qat.encoding_json import encoding_fields
from qat.errors import EncodingError, QatError, QuantizationWarning
from qat.scheme import Granularity, Scheme, int_type

Provenance = Literal["qat", "ptq", "derived", "fixed", "imported"]


def warn_of_floor(name: str, scale: Tensor, *, stacklevel: int = 1) -> None:
    """Warn with `QuantizationWarning` where a range was too small for a scale of its own (see `range_to_scale`).

    Args:
        name: Name of the tensor.
        scale: Its scales, float32, any shape.
        stacklevel: 1 blames the line that calls this, as in `warnings.warn`.
    """
    flat = int((scale <= numerics.SCALE_FLOOR).sum())
    if flat:
        where = "" if flat == scale.numel() else f" in {flat} of {scale.numel()} channels"
        warnings.warn(
            f"{name!r} is all zero{where}, or next to it; its scale is set to the floor, {numerics.SCALE_FLOOR:.3g}; "
            "check whether the layer is dead or the data are right",
            QuantizationWarning,
            stacklevel=stacklevel + 1,
        )


@dataclass(frozen=True)
class Encoding:
    """Scale, zero point and integer range of one tensor.

    Attributes:
        dtype: Name of the integer type.
        scale: One scale, or one a channel or group (row-major), positive; rounded to float32, as every runtime has it.
        zero_point: As many zero points, within `qmin` and `qmax`: zero is always exactly representable.
        qmin: Smallest code used.
        qmax: Largest code used.
        symmetric: The zero point is the middle of the type by construction.
        granularity: What shares a scale.
        min: Observed minima, one a scale, or None where nothing was observed.
        max: Observed maxima, just so.
        provenance: `qat` (learned or tracked in training), `ptq` (calibrated), `derived` (inherited through a
            shape-only operator, a tie or an interval rule), `fixed` (known output range) or `imported`.
        method: The observer, algorithm or rule that chose the range.
        samples: Number of samples observed; 0 where not applicable.

    Raises:
        EncodingError: The parts contradict each other or cannot be.
    """

    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    qmin: int
    qmax: int
    symmetric: bool = False
    granularity: Granularity = Granularity()
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    provenance: Provenance = "ptq"
    method: str = ""
    samples: int = 0

    def __post_init__(self) -> None:
        kind = int_type(self.dtype)
        if not kind.qmin <= self.qmin < self.qmax <= kind.qmax:
            raise EncodingError(
                f"integer range [{self.qmin}, {self.qmax}] is empty or outside {self.dtype}",
                f"use a range within [{kind.qmin}, {kind.qmax}]",
            )
        if not self.scale or len(self.scale) != len(self.zero_point):
            raise EncodingError(
                f"{len(self.scale)} scales and {len(self.zero_point)} zero points", "give equally many, at least one"
            )
        if self.granularity.kind == "per_tensor" and len(self.scale) != 1:
            raise EncodingError(f"{len(self.scale)} scales for a per-tensor encoding", "give exactly one")
        object.__setattr__(
            self, "scale", tuple(torch.tensor(self.scale, dtype=torch.float64).to(torch.float32).tolist())
        )
        if any(not (math.isfinite(s) and s > 0.0) for s in self.scale):
            raise EncodingError(
                "a scale is not positive and finite in float32", "check the range that it was made from"
            )
        outside = next((z for z in self.zero_point if not self.qmin <= z <= self.qmax), None)
        if outside is not None:
            raise EncodingError(
                f"the zero point {outside} is outside the integer range [{self.qmin}, {self.qmax}]",
                "choose one inside, so that zero is exactly representable",
            )
        middle = 0 if kind.signed else 1 << (kind.bits - 1)
        if self.symmetric and any(z != middle for z in self.zero_point):
            raise EncodingError(
                f"a symmetric {self.dtype} encoding has a zero point other than {middle}", "make it affine"
            )
        self._check_observed()
        if self.samples < 0:
            raise EncodingError(f"the number of samples is {self.samples!r}", "give 0 or more")
        if self.provenance not in get_args(Provenance):
            raise EncodingError(
                f"unknown provenance {self.provenance!r}", f"use one of {', '.join(get_args(Provenance))}"
            )

    def _check_observed(self) -> None:
        if (self.min is None) != (self.max is None):
            raise EncodingError("only one of min and max is given", "give both or neither")
        if self.min is None or self.max is None:
            return
        if not len(self.min) == len(self.max) == len(self.scale):
            raise EncodingError(
                f"{len(self.min)} minima and {len(self.max)} maxima for {len(self.scale)} scales", "give one a scale"
            )
        for low, high in zip(self.min, self.max, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise EncodingError(f"the observed range [{low}, {high}] is inverted or not finite", "correct it")

    @classmethod
    def from_range(
        cls,
        low: Tensor | float,
        high: Tensor | float,
        scheme: Scheme,
        *,
        provenance: Provenance = "ptq",
        method: str = "",
        samples: int = 0,
        name: str = "",
    ) -> Encoding:
        """Make the encoding of an observed range (see `numerics.range_to_scale`).

        Args:
            low: Smallest values: a number, or a tensor of one value a channel or group (row-major).
            high: Largest values, in the same shape.
            scheme: How the tensor is quantized.
            provenance: Where the range comes from.
            method: What chose the range; the scheme's observer if empty.
            samples: Number of samples observed.
            name: Name of the tensor. With it, errors name the tensor, and a `QuantizationWarning` does where the range
                is empty or so small that the scale is the floor.

        Raises:
            EncodingError: The range is not finite, inverted, or not one a channel.
        """
        low = torch.as_tensor(low, dtype=torch.float64).reshape(-1)
        high = torch.as_tensor(high, dtype=torch.float64).reshape(-1)
        try:
            encoding = cls._of_range(low, high, scheme, provenance, method, samples)
        except EncodingError as error:
            raise EncodingError(f"{name!r}: {error}" if name else str(error)) from None
        if name:
            warn_of_floor(name, encoding.scale_tensor, stacklevel=2)
        return encoding

    @classmethod
    def _of_range(
        cls, low: Tensor, high: Tensor, scheme: Scheme, provenance: Provenance, method: str, samples: int
    ) -> Encoding:
        if low.shape != high.shape:
            raise EncodingError(f"{low.numel()} minima and {high.numel()} maxima", "give equally many")
        scale, zero_point = numerics.range_to_scale(low, high, scheme)
        qmin, qmax = scheme.code_range
        return cls(
            dtype=scheme.dtype,
            scale=tuple(scale.tolist()),
            zero_point=tuple(zero_point.tolist()),
            qmin=qmin,
            qmax=qmax,
            symmetric=scheme.symmetric,
            granularity=scheme.granularity,
            min=tuple(low.tolist()),
            max=tuple(high.tolist()),
            provenance=provenance,
            method=method or scheme.observer.name,
            samples=samples,
        )

    @property
    def per_tensor(self) -> bool:
        """Whether there is a single scale."""
        return self.granularity.kind == "per_tensor"

    @property
    def scale_tensor(self) -> Tensor:
        """Scales, float32; a scalar for per-tensor, else shape (number of scales,)."""
        values = torch.tensor(self.scale, dtype=torch.float32)
        return values.reshape(()) if self.per_tensor else values

    @property
    def zero_point_tensor(self) -> Tensor:
        """Zero points, int32, in the shape of `scale_tensor`."""
        values = torch.tensor(self.zero_point, dtype=torch.int32)
        return values.reshape(()) if self.per_tensor else values

    def quantize(self, x: Tensor, rounding: numerics.Rounding = "half_even") -> Tensor:
        """Return the codes of `x`, int32, in its shape."""
        return numerics.quantize(
            x, self.scale_tensor, self.zero_point_tensor, self.qmin, self.qmax, self.granularity, rounding
        )

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the float32 values of codes `q`, in their shape."""
        return numerics.dequantize(q, self.scale_tensor, self.zero_point_tensor, self.granularity)

    def representable(self) -> tuple[float, float]:
        """Smallest and largest float that has a code, over all channels."""
        low, high = numerics.representable_range(self.scale_tensor, self.zero_point_tensor, self.qmin, self.qmax)
        return float(low.min()), float(high.max())

    def same_grid(self, other: Encoding) -> bool:
        """Whether codes mean the same in both encodings (provenance aside)."""
        return (
            self.dtype == other.dtype
            and self.scale == other.scale
            and self.zero_point == other.zero_point
            and self.granularity == other.granularity
        )

    def derived(self, method: str) -> Encoding:
        """Return this encoding as inherited by another tensor."""
        return replace(self, provenance="derived", method=method)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this encoding (see the schema, `qat/encodings.schema.json`)."""
        out: dict[str, Any] = {
            "dtype": self.dtype,
            "scale": list(self.scale),
            "zero_point": list(self.zero_point),
            "qmin": self.qmin,
            "qmax": self.qmax,
            "symmetric": self.symmetric,
            "granularity": self.granularity.kind,
            "provenance": self.provenance,
            "method": self.method,
            "samples": self.samples,
        }
        if not self.per_tensor:
            out["axis"] = self.granularity.axis
        if self.granularity.size is not None:
            out["group_size"] = self.granularity.size
        if self.min is not None:
            out["min"] = list(self.min)
        if self.max is not None:
            out["max"] = list(self.max)
        return out

    @classmethod
    def from_json(cls, data: object, name: str = "encoding") -> Encoding:
        """Read the JSON object of an encoding.

        Raises:
            EncodingError: It is no object, a key is missing, unknown or of the wrong type, or the encoding cannot be;
                `name` is named.
        """
        try:
            return cls(**encoding_fields(data))
        except QatError as error:
            raise EncodingError(f"encoding of {name!r}: {error}") from None
