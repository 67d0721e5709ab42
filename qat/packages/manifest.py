"""`manifest.json`: what is in a package, what it promises, and how that was verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from qat.errors import PackageError
from qat.export.contract import TensorContract
from qat.files import atomic_write_text, read_json
from qat.packages.artifact import Artifact, Format
from qat.packages.executor import Check, OutputDifference

FILE = "manifest.json"
SCHEMA = "qat-package"
VERSION = 1

_PROFILES = ("onnx", "onnx-arm64", "tflite")

#: every artifact was executed and held; some were not; none was
Standing = Literal["verified", "partly verified", "unverified", "failed"]


@dataclass(frozen=True)
class Manifest:
    """What a package says of itself.

    Attributes:
        name: Name of the model.
        kind: Family of devices, such as `hexagon`.
        targets: Names of the targets.
        artifacts: What runtimes execute.
        omitted: What a package of this kind may hold and this one does not, with the cause, by path.
        golden: Number of golden samples of each artifact.
        preprocessing: How an image becomes the model's input, as far as was told.
        versions: Versions of what made the package.
        checks: What came of executing the artifacts.
        files: SHA-256 of every other file of the package, by its path with `/`.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    omitted: Mapping[str, str]
    golden: int
    preprocessing: Mapping[str, Any]
    versions: Mapping[str, str]
    checks: tuple[Check, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def standing(self) -> Standing:
        """What the checks come to."""
        return standing(self.artifacts, self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "name": self.name,
            "kind": self.kind,
            "targets": list(self.targets),
            "artifacts": [
                {
                    "path": artifact.path,
                    "format": artifact.format,
                    "numerics": artifact.numerics,
                    "inputs": [contract.to_json() for contract in artifact.inputs],
                    "outputs": [contract.to_json() for contract in artifact.outputs],
                    "options": dict(artifact.options),
                    "also_simulated": list(artifact.also_simulated),
                }
                for artifact in self.artifacts
            ],
            "omitted": dict(self.omitted),
            "golden": self.golden,
            "preprocessing": dict(self.preprocessing),
            "versions": dict(self.versions),
            "verification": {"standing": self.standing, "checks": [check.to_json() for check in self.checks]},
            "files": dict(sorted(self.files.items())),
        }


def standing(artifacts: tuple[Artifact, ...], checks: tuple[Check, ...]) -> Standing:
    """Return what checks come to.

    An artifact counts as executed when one runtime passed and none failed, or when all that execute it are optional.
    """
    if any(check.status == "failed" for check in checks):
        return "failed"
    passed = {check.artifact for check in checks if check.status == "passed"}
    if not passed:
        return "unverified"
    needed = {check.artifact for check in checks if not check.optional}
    spared = {check.artifact for check in checks if check.optional} - needed
    absent = any(check.status == "not run" and not check.optional for check in checks)
    return "partly verified" if absent or {a.path for a in artifacts} - passed - spared else "verified"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`.

    Raises:
        OutputError: It cannot be written.
    """
    atomic_write_text(folder / FILE, json.dumps(manifest.to_json(), indent=1, allow_nan=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a package; paths that lead out of the folder are refused.

    Raises:
        PackageError: There is none, or it is not one that `qat` wrote; the key is named.
    """
    path = folder / FILE
    mend = "give the folder of a package that qat wrote"
    if not path.is_file():
        raise PackageError(f"{folder} has no {FILE}", mend)
    data = read_json(path, PackageError, mend)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise PackageError(f"{path} is not the manifest of a package", mend)
    if data.get("version") != VERSION:
        raise PackageError(f"{path} has version {data.get('version')!r}", f"this qat reads {VERSION}")
    try:
        manifest = _manifest(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise PackageError(f"{path} is malformed ({cause})", "make the package again") from None
    for name in (*manifest.files, *(artifact.path for artifact in manifest.artifacts)):
        inside(folder, name)
    return manifest


def _manifest(data: Mapping[str, Any]) -> Manifest:
    artifacts = tuple(
        Artifact(
            _text(entry["path"]),
            _one_of(entry["format"], get_args(Format)),
            _one_of(entry["numerics"], _PROFILES),
            tuple(_contract(c) for c in entry["inputs"]),
            tuple(_contract(c) for c in entry["outputs"]),
            tuple((_text(k), _text(v)) for k, v in entry["options"].items()),
            # packages of older versions have no such key
            tuple(_one_of(name, _PROFILES) for name in entry.get("also_simulated", [])),
        )
        for entry in data["artifacts"]
    )
    checks = tuple(
        Check(
            **{
                **entry,
                "outputs": tuple(OutputDifference(**o) for o in entry["outputs"]),
                "notes": tuple(entry["notes"]),
            }
        )
        for entry in data["verification"]["checks"]
    )
    golden = data["golden"]
    if not isinstance(golden, int) or golden < 0:
        raise ValueError(f"golden is {golden!r}")
    return Manifest(
        _text(data["name"]),
        _text(data["kind"]),
        tuple(_text(t) for t in data["targets"]),
        artifacts,
        {_text(k): _text(v) for k, v in data["omitted"].items()},
        golden,
        dict(data["preprocessing"]),
        {_text(k): _text(v) for k, v in data["versions"].items()},
        checks,
        {_text(k): _text(v) for k, v in data["files"].items()},
    )


def _contract(entry: Mapping[str, Any]) -> TensorContract:
    sizes = {key: tuple(int(d) for d in entry[key]) for key in ("shape", "order")}
    return TensorContract(**{**entry, **sizes})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _one_of(value: object, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return value


def inside(folder: Path, name: str) -> Path:
    """Return the path of a package's file.

    Raises:
        PackageError: The name leads out of the folder, by itself or through a link.
    """
    pure = PurePosixPath(name)
    bad = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name
    path = folder.joinpath(*pure.parts) if not bad else folder
    if bad or not path.resolve().is_relative_to(folder.resolve()):
        raise PackageError(f"the manifest of {folder} names {name!r}, which is not in the package", "do not use it")
    return path


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a package but its manifest, by path.

    Raises:
        PackageError: There is a link, which could lead out of the folder.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise PackageError(f"{path} is a link", "packages hold files only; remove it")
        if path.is_file() and name != FILE:
            found[name] = checksum(path)
    return found


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def tampered(folder: Path, manifest: Manifest) -> list[str]:
    """Return what of a package's files is not as the manifest says, one line each."""
    found = checksums(folder)
    lines = [f"{name} is missing" for name in sorted(set(manifest.files) - set(found))]
    lines += [f"{name} is not in the manifest" for name in sorted(set(found) - set(manifest.files))]
    lines += [
        f"{name} was changed: its SHA-256 is {found[name][:12]}…, not {wanted[:12]}…"
        for name, wanted in sorted(manifest.files.items())
        if name in found and found[name] != wanted
    ]
    return lines
