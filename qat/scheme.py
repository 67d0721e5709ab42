"""How one tensor is to be quantized: integer types, granularity and `Scheme`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from qat.errors import SchemeError

GranularityKind = Literal["per_tensor", "per_channel", "per_group"]


@dataclass(frozen=True)
class IntType:
    """An integer type that codes are stored in."""

    name: str
    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


#: every integer type that `qat` can quantize to, by name
INT_TYPES: Mapping[str, IntType] = MappingProxyType(
    {
        name: IntType(name, bits, signed)
        for name, bits, signed in (
            ("int4", 4, True),
            ("uint4", 4, False),
            ("int8", 8, True),
            ("uint8", 8, False),
            ("int16", 16, True),
            ("uint16", 16, False),
            ("int32", 32, True),
        )
    }
)


def int_type(name: str) -> IntType:
    """Return the integer type called `name`.

    Raises:
        SchemeError: There is no such type.
    """
    try:
        return INT_TYPES[name]
    except (KeyError, TypeError):
        raise SchemeError(f"unknown integer type {name!r}", f"choose one of {', '.join(INT_TYPES)}") from None


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share one scale and zero point.

    Attributes:
        kind: `per_tensor`: all; `per_channel`: those with the same index along `axis`; `per_group`: runs of `size`
            neighbours along `axis`, separately for every index of the other axes (blocked quantization of ONNX).
        axis: The channel or group axis, negative from the end; always 0 for `per_tensor`.
        size: Elements in a group; only for `per_group`.
    """

    kind: GranularityKind = "per_tensor"
    axis: int = 0
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("per_tensor", "per_channel", "per_group"):
            raise SchemeError(f"unknown granularity {self.kind!r}", "choose per_tensor, per_channel or per_group")
        for name, value in (("axis", self.axis), ("group size", self.size)):
            if not _whole(value) and not (value is None and name == "group size"):
                raise SchemeError(f"{name} {value!r} is not an integer", "give an integer")
        if (self.kind == "per_group") != (self.size is not None):
            raise SchemeError(
                f"granularity {self.kind} with group size {self.size}", "give a size for per_group and only for it"
            )
        if self.size is not None and self.size < 1:
            raise SchemeError(f"group size {self.size} is not positive", "give a size of at least 1")
        if self.kind == "per_tensor":
            object.__setattr__(self, "axis", 0)  # so that equal ones compare equal


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


PER_TENSOR = Granularity()


@dataclass(frozen=True)
class _Spec:
    """Something by its registered name, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __hash__(self) -> int:
        # not the values: an option may be a list
        return hash((self.name, tuple(sorted(self.options))))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.name, dict(self.options)))

    def describe(self) -> str:
        """Return name and options, such as `lsq` or `static(drop=0.5)`."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class ObserverSpec(_Spec):
    """An observer by its registered name, with its options."""

    name: str = "minmax"
    __hash__ = _Spec.__hash__


@dataclass(frozen=True)
class QuantizerSpec(_Spec):
    """A fake quantizer by its registered name, with its options."""

    name: str = "static"
    __hash__ = _Spec.__hash__


@dataclass(frozen=True)
class Scheme:
    """How one tensor is to be quantized.

    Attributes:
        dtype: Name of the integer type of the codes.
        symmetric: The zero point is the middle of the type (0 for signed types) and the range is symmetric.
        granularity: What shares a scale.
        observer: Which statistic chooses the range.
        quantizer: Which fake quantizer is trained (`static`, `lsq`, ...).
        qmin: Narrower smallest code, or None for the type's.
        qmax: Narrower largest code, or None for the type's.
        power_of_two: Scales are rounded up to a power of two.
    """

    dtype: str = "uint8"
    symmetric: bool = False
    granularity: Granularity = PER_TENSOR
    observer: ObserverSpec = field(default_factory=ObserverSpec)
    quantizer: QuantizerSpec = field(default_factory=QuantizerSpec)
    qmin: int | None = None
    qmax: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        kind = int_type(self.dtype)
        for name in ("qmin", "qmax"):
            if not (getattr(self, name) is None or _whole(getattr(self, name))):
                raise SchemeError(f"{name} {getattr(self, name)!r} is not an integer", "give an integer")
        for name in ("symmetric", "power_of_two"):
            if not isinstance(getattr(self, name), bool):
                raise SchemeError(f"{name} is {getattr(self, name)!r}", "write true or false")
        low, high = self.code_range
        if not kind.qmin <= low < high <= kind.qmax:
            raise SchemeError(
                f"integer range [{low}, {high}] is empty or outside {self.dtype}",
                f"choose qmin < qmax within [{kind.qmin}, {kind.qmax}]",
            )
        if self.symmetric and not low <= self.symmetric_zero_point <= high:
            raise SchemeError(
                f"integer range [{low}, {high}] does not hold the symmetric zero point {self.symmetric_zero_point}",
                "widen the range or choose an affine scheme",
            )

    @property
    def int_type(self) -> IntType:
        """The integer type of the codes."""
        return int_type(self.dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code that is used."""
        kind = int_type(self.dtype)
        return (kind.qmin if self.qmin is None else self.qmin, kind.qmax if self.qmax is None else self.qmax)

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of a symmetric tensor: 0 for signed types, 2**(bits-1) for unsigned ones."""
        kind = int_type(self.dtype)
        return 0 if kind.signed else 1 << (kind.bits - 1)

    def with_(self, **changes: Any) -> Scheme:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def describe(self) -> str:
        """Return a short description such as `int8 sym per_channel(0) minmax`."""
        place = {
            "per_tensor": "per_tensor",
            "per_channel": f"per_channel({self.granularity.axis})",
            "per_group": f"per_group({self.granularity.axis}, {self.granularity.size})",
        }[self.granularity.kind]
        words = [self.dtype, "sym" if self.symmetric else "affine", place, self.observer.name]
        if self.qmin is not None or self.qmax is not None:
            words.append("[{}, {}]".format(*self.code_range))
        if self.power_of_two:
            words.append("po2")
        if self.quantizer != QuantizerSpec():
            words.append(self.quantizer.describe())
        return " ".join(words)
