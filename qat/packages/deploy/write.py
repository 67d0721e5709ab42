"""A package's `deploy.sh` and what it reads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from qat.errors import ExportError
from qat.files import atomic_write_text
from qat.packages.artifact import Artifact
from qat.packages.golden import sample_folder

FILE = "deploy.sh"
FOLDER = "deploy"
_SOURCES = Path(__file__).parent
#: machine of an ELF file
_ARM64 = (183).to_bytes(2, "little")
#: scripts by the kind of package
_SCRIPTS = {"arm-cpu": "arm_cpu.sh", "hexagon": "hexagon.sh", "apu": "apu.sh"}


def write_deploy(
    folder: Path,
    family: str,
    name: str,
    artifacts: Sequence[Artifact],
    golden: int,
) -> None:
    """Write `deploy.sh` and `deploy/` into a package whose artifacts and golden samples are written already.

    Args:
        folder: The package's folder.
        family: Kind of the package: `arm-cpu`, `hexagon` or `apu`.
        name: Name of the model; the run directory on the phone is named after it.
        artifacts: The package's artifacts.
        golden: Number of golden samples of each artifact.

    Raises:
        ExportError: A file is missing, or a name has characters that a table cannot hold; it is named.
        OutputError: A file cannot be written.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name) or "model"
    lines: list[tuple[str, ...]] = [("package", safe), ("family", family)]
    lines += [("runner", path) for path in _runners(folder)]
    for artifact in artifacts:
        lines += _rows(folder, artifact, golden)
    for line in lines:
        if any("\t" in word or "\n" in word for word in line):
            raise ExportError(f"{line!r} has a tab or a line break in a name", "rename the tensor or the file")
    script = "\n".join(
        (_SOURCES / part).read_text(encoding="utf-8").removeprefix("# shellcheck shell=sh\n")
        for part in ("common.sh", "compare.sh", _SCRIPTS[family])
    )
    atomic_write_text(folder / FOLDER / "contents.tsv", "".join("\t".join(line) + "\n" for line in lines))
    if family == "hexagon":
        shutil.copyfile(_SOURCES / "soc.tsv", folder / FOLDER / "soc.tsv")
    atomic_write_text(folder / FILE, f'{script}\nmain "$@"\n')
    (folder / FILE).chmod(0o755)


def _runners(folder: Path) -> Iterator[str]:
    """The native runner that a package may hold, built for arm64."""
    for path in sorted(folder.rglob("qat_run")):
        head = path.read_bytes()[:20] if path.is_file() else b""
        if head[:4] == b"\x7fELF" and head[18:] == _ARM64:
            yield path.relative_to(folder).as_posix()


def _rows(folder: Path, artifact: Artifact, golden: int) -> Iterator[tuple[str, ...]]:
    """The lines of an artifact; no field is empty, for a shell would not see it."""
    options = ",".join(f"{key}={value}" for key, value in artifact.options) or "-"
    yield "artifact", _existing(folder, artifact.path), artifact.format, options
    for beside in _beside(folder, artifact):
        yield "file", artifact.path, beside
    for sample in range(golden):
        place = sample_folder(folder, artifact, sample).relative_to(folder).as_posix()
        for kind, contracts in (("input", artifact.inputs), ("output", artifact.outputs)):
            for index, contract in enumerate(contracts):
                file = _existing(folder, f"{place}/{kind}_{index}.npy")
                scale = "1" if contract.scale is None else f"{contract.scale:.9g}"
                shape = ",".join(map(str, contract.shape)) or "1"
                yield kind, artifact.path, file, contract.name, f"{sample:03d}", contract.dtype, scale, shape


def _beside(folder: Path, artifact: Artifact) -> list[str]:
    """Files that an artifact refers to: the weights of a large ONNX model, the blob of a context."""
    path = folder / artifact.path
    if artifact.format == "qnn-context":
        found = [other for other in sorted(path.parent.iterdir()) if other != path and other.is_file()]
    else:
        found = [other for other in [path.with_name(f"{path.name}.data")] if other.is_file()]
    return [other.relative_to(folder).as_posix() for other in found]


def _existing(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise ExportError(f"{folder / name} is missing", "write the artifacts and golden samples before deploy.sh")
    return name
