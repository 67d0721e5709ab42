"""Executing the artifacts of a package, when it is made and ever after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qat.errors import QatError
from qat.packages.artifact import Artifact
from qat.packages.differences import differences, fineness
from qat.packages.executor import Check, Executor, Status
from qat.packages.golden import read_golden
from qat.packages.kinds import kind_named
from qat.packages.manifest import Manifest, Standing, read_manifest, tampered


@dataclass(frozen=True)
class PackageVerification:
    """What a package came to when it was verified again.

    Attributes:
        folder: The package.
        manifest: Its manifest, with the checks of now.
        tampered: Files that are not as the manifest says, one line each; nothing is executed then.
    """

    folder: Path
    manifest: Manifest
    tampered: tuple[str, ...]

    @property
    def standing(self) -> Standing:
        """`failed` where a file was tampered with or a check did not hold."""
        return "failed" if self.tampered else self.manifest.standing

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.manifest.kind} package for {', '.join(self.manifest.targets)}, {self.standing}"]
        lines += [f"  {line}" for line in self.tampered]
        lines += [f"  {describe(check)}" for check in self.manifest.checks]
        lines += [f"  {path} is not in the package: {cause}" for path, cause in self.manifest.omitted.items()]
        return "\n".join(lines)


def describe(check: Check) -> str:
    """Return one line about a check."""
    head = f"{check.artifact} in {check.runtime or check.executor}"
    if check.status == "not run":
        return f"{head}: NOT RUN, {'; '.join(check.notes)}"
    said = f" ({'; '.join(check.notes)})" if check.notes else ""
    if not check.outputs:
        return f"{head}: {check.status}{said}"
    worst = max(check.outputs, key=lambda output: (output.max_difference, -output.equal_share))
    return (
        f"{head}: {check.status}, {check.samples} samples, largest difference {worst.max_difference:g} codes, "
        f"{100 * worst.equal_share:.4g} % equal ({worst.name}){said}"
    )


def execute(
    folder: Path,
    artifacts: Sequence[Artifact],
    golden: int,
    executors: Sequence[Executor],
    say: Callable[[Check], None] | None = None,
) -> tuple[Check, ...]:
    """Run every executor on every artifact that it is for, and compare with the golden samples.

    Args:
        folder: The package.
        artifacts: Its artifacts.
        golden: Number of golden samples.
        executors: What can execute them.
        say: Called with each check.

    Raises:
        DataError: A golden sample cannot be read.
    """
    checks = []
    for artifact in artifacts:
        for executor in executors:
            if executor.accepts(artifact):
                checks.append(_check(folder, artifact, golden, executor))
                if say is not None:
                    say(checks[-1])
    return tuple(checks)


def _check(folder: Path, artifact: Artifact, golden: int, executor: Executor) -> Check:
    blank = Check(artifact.path, executor.name, "", "not run", optional=executor.optional)
    missing = executor.missing()
    if missing is not None:
        return replace(blank, notes=(f"{missing.what} is missing", missing.mend))
    profile = executor.numerics or artifact.numerics
    if profile not in (artifact.numerics, *artifact.also_simulated):
        # a package that was made before there was such a profile
        return replace(blank, notes=(f"golden samples of the profile {profile} are missing", "make the package again"))
    inspects = executor.role == "inspection"
    count = 0 if inspects else min(golden, executor.samples) if executor.samples else golden
    inputs, expected = read_golden(folder, artifact, count, profile)
    file = folder / artifact.path
    bound = executor.bound(file) if callable(executor.bound) else executor.bound
    begun = replace(blank, runtime=executor.runtime(), samples=count, bound=bound)
    try:
        found, notes = executor.run(file, artifact, inputs)
        apart = () if inspects else differences(artifact.outputs, found, expected)
    except QatError as error:
        return replace(begun, status="failed", notes=(str(error),))
    # bounds are of codes of 8 bits, so that one means the same share of the range at every width
    within = all(
        output.max_difference <= bound * fineness(contract)
        for output, contract in zip(apart, artifact.outputs, strict=not inspects)
    )
    status: Status = "recorded" if executor.role != "proof" else "passed" if within else "failed"
    return replace(begun, status=status, outputs=apart, notes=tuple(notes))


def verify_package(folder: str | Path, *, say: Callable[[Check], None] | None = None) -> PackageVerification:
    """Check a package's files, and execute again all that can be executed here.

    Args:
        folder: The package.
        say: Called with each check.

    Raises:
        PackageError: It is no package, or its manifest is malformed or names files outside of it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    changed = tuple(tampered(folder, manifest))
    if changed:
        return PackageVerification(folder, replace(manifest, checks=()), changed)
    executors = kind_named(manifest.kind).executors(manifest.targets)
    checks = execute(folder, manifest.artifacts, manifest.golden, executors, say)
    return PackageVerification(folder, replace(manifest, checks=checks), ())
