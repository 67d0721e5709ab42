"""The table of the encodings of all tensors: `Encodings`, and what two tables differ in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qat.encoding import Encoding
from qat.errors import EncodingError
from qat.files import atomic_write_text, read_json
from qat.scheme import Granularity

SCHEMA_VERSION = 1


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
