"""The kinds of packages: for which targets there is one, what is in it, and what executes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat.errors import PackageError, TargetError
from qat.export.io_mode import IoMode
from qat.packages import apu, arm_cpu, hexagon, hexagon_runtimes
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor
from qat.packages.source import Source


@dataclass(frozen=True)
class Kind:
    """A kind of package.

    Attributes:
        name: Such as `hexagon`.
        title: For people.
        targets: Names of the targets that it serves.
        write: Writes the artifacts below a folder; what could not be written it returns by path, with the cause.
        executors: What executes the artifacts of a package for these targets.
    """

    name: str
    title: str
    targets: tuple[str, ...]
    write: Callable[[Source, Path, IoMode], tuple[tuple[Artifact, ...], Mapping[str, str]]]
    executors: Callable[[Sequence[str]], tuple[Executor, ...]]


KINDS = (
    Kind("arm-cpu", "ARM CPU", ("arm-cpu",), arm_cpu.write, arm_cpu.executors),
    Kind("apu", "MediaTek APU", ("apu",), apu.write, apu.executors),
    Kind("hexagon", "Qualcomm Hexagon", hexagon.TARGETS, hexagon.write, hexagon_runtimes.executors),
)


def kind_named(name: str) -> Kind:
    """Return a kind by name.

    Raises:
        PackageError: There is none.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise PackageError(f"there is no package of kind {name!r}", f"this qat knows {', '.join(k.name for k in KINDS)}")


def kind_for(targets: Sequence[str]) -> Kind:
    """Return the kind of package that serves all targets.

    Raises:
        TargetError: There is none.
    """
    for kind in KINDS:
        if targets and set(targets) <= set(kind.targets):
            return kind
    known = ", ".join(name for kind in KINDS for name in kind.targets)
    raise TargetError(
        f"there is no package for {' with '.join(targets) or 'no target'}",
        f"targets that have one, together where they share a name: {known}",
    )


def by_kind(targets: Sequence[str]) -> dict[Kind, tuple[str, ...]]:
    """Group targets by the kind of package that serves them; those without one are left out."""
    found = {kind: tuple(name for name in targets if name in kind.targets) for kind in KINDS}
    return {kind: names for kind, names in found.items() if names}
