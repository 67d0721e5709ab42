"""The result of quantizing one tensor (`Encoding`) and the table of all of them (`Encodings`)."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qat import numerics
from qat.encoding_json import encoding_fields
from qat.errors import EncodingError, QatError, QuantizationWarning
from qat.files import atomic_write_text, read_json
from qat.scheme import Granularity, Scheme, int_type

Provenance = Literal["qat", "ptq", "derived", "fixed", "imported"]
SCHEMA_VERSION = 1


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


@dataclass(frozen=True)
class Difference:
    """One tensor in which two tables differ."""

    name: str
    left: Encoding | None
    right: Encoding | None

    def describe(self) -> str:
        """Return one line: which side lacks the tensor, or how scale, zero point and dtype differ."""
        if self.left is None or self.right is None:
            return f"{self.name}: only in the {'second' if self.left is None else 'first'}"
        a, b = self.left, self.right
        words = [
            f"{label} {x} -> {y}"
            for label, x, y in (
                ("dtype", a.dtype, b.dtype),
                ("symmetric", a.symmetric, b.symmetric),
                ("granularity", _place(a.granularity), _place(b.granularity)),
                ("range", f"[{a.qmin}, {a.qmax}]", f"[{b.qmin}, {b.qmax}]"),
                ("provenance", a.provenance, b.provenance),
                ("method", a.method, b.method),
            )
            if x != y
        ]
        if len(a.scale) != len(b.scale):
            words.insert(0, f"{len(a.scale)} -> {len(b.scale)} scales")
        else:
            if a.zero_point != b.zero_point:
                moved = [abs(y - x) for x, y in zip(a.zero_point, b.zero_point, strict=True)]
                words.insert(0, f"zero point{_largest(moved, a.zero_point, b.zero_point)}")
            if a.scale != b.scale:
                grown = [abs(y / x - 1.0) for x, y in zip(a.scale, b.scale, strict=True)]
                words.insert(0, f"scale{_largest(grown, a.scale, b.scale)} (by {100 * max(grown):.3g} %)")
        return f"{self.name}: " + (", ".join(words) or "observed range or sample count")


def _largest(changes: Sequence[float], before: Sequence[float], after: Sequence[float]) -> str:
    """Return the values that changed most, with their index where there are several: `[3] 0.5 -> 0.25`."""
    worst = max(range(len(changes)), key=changes.__getitem__)
    place = f"[{worst}]" if len(changes) > 1 else ""
    return f"{place} {_number(before[worst])} -> {_number(after[worst])}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _short(values: Sequence[float]) -> str:
    text = _number(values[0])
    return text if len(values) == 1 else f"{text}.. ({len(values)})"


def _place(granularity: Granularity) -> str:
    size = "" if granularity.size is None else f", {granularity.size}"
    return granularity.kind if granularity.kind == "per_tensor" else f"{granularity.kind}({granularity.axis}{size})"


class Encodings(Mapping[str, Encoding]):
    """An immutable table of encodings by tensor name.

    Args:
        entries: Encodings by name.
        meta: Free-form strings that travel with the table (model name, versions); no part of its equality.

    Raises:
        EncodingError: A key or value of `meta` is not a string.
    """

    def __init__(self, entries: Mapping[str, Encoding] | None = None, meta: Mapping[str, str] | None = None) -> None:
        self._entries = dict(entries or {})
        self.meta: Mapping[str, str] = dict(meta or {})
        for key, value in self.meta.items():
            if not (isinstance(key, str) and isinstance(value, str)):
                raise EncodingError(f"meta entry {key!r} of a table of encodings is not a string", "give a string")

    def __getitem__(self, name: str) -> Encoding:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Encodings({len(self)} tensors)"

    def __str__(self) -> str:
        rows = [
            (
                name,
                e.dtype,
                _short(e.scale),
                _short(e.zero_point),
                f"[{min(e.min):.5g}, {max(e.max):.5g}]" if e.min and e.max else "",
                e.provenance,
                e.method,
            )
            for name, e in self._entries.items()
        ]
        header = ("tensor", "dtype", "scale", "zero point", "observed", "from", "method")
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        )

    def merge(self, other: Encodings, prefer: Literal["self", "other", "qat", "ptq"] = "self") -> Encodings:
        """Return the union of two tables; each entry keeps its provenance.

        Args:
            other: The other table.
            prefer: Which entry wins where both have a tensor: the one in `self` or in `other`, or the one of that
                provenance (where both or neither have it, the one in `self`).

        Raises:
            EncodingError: `prefer` is none of these.
        """
        if prefer not in ("self", "other", "qat", "ptq"):
            raise EncodingError(f"cannot prefer {prefer!r}", "choose self, other, qat or ptq")
        merged = dict(self._entries)
        for name, theirs in other.items():
            mine = merged.get(name)
            if mine is None or prefer == "other" or (mine.provenance != prefer == theirs.provenance):
                merged[name] = theirs
        return Encodings(merged, {**other.meta, **self.meta})

    def diff(self, other: Encodings) -> tuple[Difference, ...]:
        """Return the tensors in which the tables differ, in the order of `self`, then of `other`."""
        names = list(dict.fromkeys([*self, *other]))
        return tuple(
            Difference(name, self.get(name), other.get(name)) for name in names if self.get(name) != other.get(name)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of the table."""
        return {
            "schema": "qat-encodings",
            "version": SCHEMA_VERSION,
            "meta": dict(self.meta),
            "encodings": {name: e.to_json() for name, e in self._entries.items()},
        }

    @classmethod
    def from_json(cls, data: object, source: str = "encodings") -> Encodings:
        """Read the JSON document of a table.

        Raises:
            EncodingError: It is not such a document, or of a newer version.
        """
        if not isinstance(data, dict) or data.get("schema") != "qat-encodings":
            raise EncodingError(f"{source} is not a table of encodings", 'it must say "schema": "qat-encodings"')
        version = data.get("version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise EncodingError(
                f"{source} has version {version!r} of the schema", f"this qat reads version {SCHEMA_VERSION}"
            )
        for key in data:
            if key not in ("schema", "version", "meta", "encodings"):
                raise EncodingError(f"{source} has the unknown key {key!r}", "remove it")
        entries, meta = data.get("encodings"), data.get("meta", {})
        if not isinstance(entries, dict) or not isinstance(meta, dict):
            key = "meta" if isinstance(entries, dict) else "encodings"
            raise EncodingError(f"{source}: {key!r} is missing or is not an object", "see the JSON schema")
        try:
            return cls({name: Encoding.from_json(entry, name) for name, entry in entries.items()}, meta)
        except EncodingError as error:
            raise EncodingError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically; floats keep every bit.

        Raises:
            OutputError: The file cannot be written.
        """
        atomic_write_text(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Encodings:
        """Read a table that `save` wrote.

        Raises:
            EncodingError: The file is missing, is not JSON, or is not a table of encodings.
        """
        data = read_json(Path(path), EncodingError, "give a file written by Encodings.save")
        return cls.from_json(data, str(path))
