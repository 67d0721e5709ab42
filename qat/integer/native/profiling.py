"""Where the operators of a program run, and the time that each of them takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """Which operators of a model run in the native runner.

    Attributes:
        active: The native runner is used, for inputs on the CPU.
        reason: Why, in one line.
        operators: Number of operators of the program.
        parts: Number of calls of the runner for one run of the model.
        in_pytorch: Why an operator runs in PyTorch, by the name of its first output.
    """

    active: bool
    reason: str
    operators: int
    parts: int
    in_pytorch: Mapping[str, str]

    def __str__(self) -> str:
        """A line that sums up, and one for each operator that runs in PyTorch though the runner is there."""
        if not self.active:
            return f"PyTorch runs all {self.operators} operators: {self.reason}"
        count = self.operators - len(self.in_pytorch)
        calls = "1 call" if self.parts == 1 else f"{self.parts} calls"
        lines = [f"the native runner runs {count} of {self.operators} operators, in {calls}"]
        return "\n".join([*lines, *(f"  {name} in PyTorch: {reason}" for name, reason in self.in_pytorch.items())])


@dataclass(frozen=True)
class OpTime:
    """How long one operator took.

    Attributes:
        name: The user's name of the operator; behind a colon, what a copy was for.
        kind: Kind of the operator, of the runner or of the program.
        where: `native` or `pytorch`.
        seconds: Shortest time of one run.
        macs: Multiply-accumulates of the whole batch.
    """

    name: str
    kind: str
    where: str
    seconds: float
    macs: int


@dataclass(frozen=True)
class Profile:
    """The time of every operator of a model; prints as a table.

    Attributes:
        entries: In execution order.
        batch: Batch size.
        threads: Number of threads.
    """

    entries: tuple[OpTime, ...]
    batch: int
    threads: int

    @property
    def seconds(self) -> float:
        """Sum over all operators."""
        return sum(entry.seconds for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with all that the table shows."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "seconds": self.seconds,
            "operators": [vars(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        """A table in execution order; operators without any time of their own are left out."""
        total = self.seconds or 1.0
        shown = [entry for entry in self.entries if entry.seconds * 1e7 >= 1.0]
        rows: list[tuple[str, ...]] = [("operator", "kind", "where", "us", "share", "MMACs", "GMAC/s")]
        rows += [_row(entry, total) for entry in shown]
        macs = sum(entry.macs for entry in self.entries)
        rows.append(_row(OpTime("all", "", "", self.seconds, macs), total))
        title = f"batch size {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return "\n".join([title, *_aligned(rows)])


def _row(entry: OpTime, total: float) -> tuple[str, ...]:
    rate = f"{entry.macs / entry.seconds / 1e9:.1f}" if entry.macs and entry.seconds else ""
    return (
        entry.name, entry.kind, entry.where, f"{entry.seconds * 1e6:.1f}", f"{100 * entry.seconds / total:.1f} %",
        f"{entry.macs / 1e6:.2f}" if entry.macs else "", rate,
    )  # fmt: skip


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    words = 3  # columns of words are aligned to the left, of numbers to the right
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
