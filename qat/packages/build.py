"""`package`: from a prepared model to a verified package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError, StateError, TargetError, VerificationError
from qat.export.io_mode import Border, IoMode
from qat.export.model import split
from qat.export.onnx import qat_version
from qat.graph.batches import model_inputs
from qat.graph.prepared import PreparedModel
from qat.integer.profiles import same_arithmetic
from qat.packages.artifact import Artifact
from qat.packages.deploy.write import write_deploy
from qat.packages.executor import Check, Executor
from qat.packages.folder import staged_folder
from qat.packages.golden import golden_samples, write_golden, write_outputs
from qat.packages.kinds import kind_for
from qat.packages.manifest import Manifest, checksums, write_manifest
from qat.packages.readme import readme
from qat.packages.source import Source
from qat.packages.verify import PackageVerification, describe, execute

ENCODINGS = "encodings.json"


@dataclass(frozen=True)
class Package:
    """A package that was made.

    Attributes:
        folder: Where it is.
        manifest: What is in it, what it promises, and how that was verified.
    """

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        return str(PackageVerification(self.folder, self.manifest, ()))


def package(
    qmodel: PreparedModel,
    target: str | Sequence[str],
    folder: str | os.PathLike[str],
    *,
    samples: Iterable[Any] | None = None,
    golden: int = 4,
    io: IoMode | Border = "float",
    name: str = "model",
    preprocessing: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    say: Callable[[Check], None] | None = None,
) -> Package:
    """Make a package for a target, execute what is in it in every runtime that is here, and compare code by code.

    Args:
        qmodel: A calibrated or trained model, prepared for this target or for an intersection with it.
        target: Name of the target, or names of several of one family (`hexagon-v69`, `hexagon-v73`).
        folder: Where the package is to be: a folder that does not exist, or is empty.
        samples: Batches for the golden samples, as for `calibrate`; None for those that calibration has kept.
        golden: Number of golden samples, at least 1; each is executed and compared.
        io: Whether the artifacts take and give floats or codes.
        name: Name of the model.
        preprocessing: How an image becomes the model's input; goes into the manifest as it is.
        overwrite: Replace a package that is in the folder.
        say: Called with what came of each execution.

    Returns:
        The package. `manifest.standing` says whether every runtime was here.

    Raises:
        StateError: The model was not calibrated, or there are no samples.
        TargetError: There is no package for the target, or the model was prepared for another one.
        ExportError: The model cannot be expressed; the tensor or operator is named.
        VerificationError: A runtime's result differs by more than its bound; no package is left.
        OutputError: The folder exists and is no package, or cannot be written.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    kind = kind_for(targets)
    prepared_for = qmodel.plan.target.split("+")
    for wanted in targets:
        if wanted not in prepared_for:
            raise TargetError(
                f"the model was prepared for {qmodel.plan.target}, not for {wanted}",
                f"prepare it with target=load_target({', '.join(map(repr, targets))}), or with more targets",
            )
    if golden < 1:
        raise ExportError(f"{golden} golden samples verify nothing", "use at least 1")
    mode = IoMode.of(io)
    source = Source(qmodel, name, _batches(qmodel, samples, golden), targets)
    with staged_folder(Path(folder), overwrite=overwrite) as stage:
        artifacts, omitted = kind.write(source, stage, mode)
        executors = kind.executors(targets)
        artifacts = tuple(_with_golden(source, stage, artifact, executors) for artifact in artifacts)
        write_deploy(stage, kind.name, name, artifacts, len(source.batches))
        source.encodings.save(stage / ENCODINGS)
        checks = execute(stage, artifacts, len(source.batches), executors, say)
        failed = [check for check in checks if check.status == "failed"]
        if failed:
            raise VerificationError(
                f"{describe(failed[0])} (bound: {failed[0].bound:g})", "no package was left; compare layer by layer"
            )
        manifest = Manifest(
            name,
            kind.name,
            targets,
            artifacts,
            omitted,
            len(source.batches),
            dict(preprocessing or {}),
            _versions(),
            checks,
        )
        (stage / "README.md").write_text(readme(kind.title, manifest), encoding="utf-8")
        manifest = replace(manifest, files=checksums(stage))
        write_manifest(stage, manifest)
    return Package(Path(folder), manifest)


def _with_golden(source: Source, folder: Path, artifact: Artifact, executors: Sequence[Executor]) -> Artifact:
    """Write the golden samples of an artifact, in its profile and in those of the runtimes that have another."""
    simulation = source.simulation(artifact.numerics)
    inputs, outputs = golden_samples(simulation, artifact, source.batches)
    write_golden(folder, artifact, inputs, outputs)
    profiles = {e.numerics for e in executors if e.accepts(artifact)} - {"", artifact.numerics}
    for profile in sorted(profiles):
        if not same_arithmetic(simulation.program, profile):
            other = golden_samples(source.simulation(profile), artifact, source.batches)[1]
            write_outputs(folder, artifact, other, profile, outputs)
    return replace(artifact, also_simulated=tuple(sorted(profiles)))


def _batches(qmodel: PreparedModel, samples: Iterable[Any] | None, golden: int) -> tuple[tuple[Tensor, ...], ...]:
    given = [qmodel.samples] if samples is None and qmodel.samples else samples
    if given is None:
        raise StateError("there are no golden samples", "give samples, or calibrate first")
    size = qmodel.plan.batch_size or 1
    parts: list[tuple[Tensor, ...]] = []
    for batch in given:
        parts += split(qmodel, tuple(x.detach().cpu() for x in model_inputs(qmodel, batch)), size)
        if len(parts) >= golden:
            break
    if not parts:
        raise StateError("there are no golden samples", "give at least one batch")
    return tuple(parts[:golden])


def _versions() -> dict[str, str]:
    found = {"qat": qat_version(), "torch": torch.__version__}
    for name in ("onnx", "onnxruntime", "ai-edge-litert", "onnxruntime-qnn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
