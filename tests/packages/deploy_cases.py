"""Packages and phones for the tests of deploy scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.export.contract import TensorContract
from qat.packages.artifact import Artifact
from qat.packages.deploy.write import write_deploy
from qat.packages.golden import write_golden

GOLDEN = 2
PLAN = [("model.qatplan", "plan", ())]
SHELLS = [name for name in ("dash", "bash") if shutil.which(name)]
BASE = "data/local/tmp"
ARM64 = {"ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a", "ro.build.version.release": "14"}
CPU = "processor : 0\nFeatures : fp asimd {}\nCPU implementer : 0x41\n"
#: elf machine numbers
ARM, HEXAGON, X86 = 183, 164, 62


def elf(machine: int, text: str = "") -> bytes:
    """Something that has the head of an ELF file."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + machine.to_bytes(2, "little") + text.encode()


def contract(name: str, dtype: str = "int8", scale: float = 0.5) -> TensorContract:
    return TensorContract(name, name, dtype, (1, 6), (0, 1), scale, 0, -128, 127, "int8")


def expected(sample: int, dtype: str = "int8") -> np.ndarray[Any, Any]:
    """The answer to a golden sample: one more than the input in every code."""
    return (np.arange(6, dtype=dtype) + np.asarray(10 * sample + 1, dtype)).reshape(1, 6)


def make(
    folder: Path,
    family: str,
    formats: Sequence[tuple[str, str, tuple[tuple[str, str], ...]]],
    *,
    dtype: str = "int8",
    name: str = "net",
    runner: bytes | None = None,
) -> Path:
    """Write a package with these artifacts, each of (path, format, options)."""
    artifacts = []
    for path, kind, options in formats:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"model " + path.encode())
        if kind == "qnn-context":
            file.with_suffix(".bin").write_bytes(b"blob")
        artifact = Artifact(
            path,
            kind,
            "onnx",
            (contract("x", dtype),),
            (contract("y 'z", dtype),),
            options,  # type: ignore[arg-type]
        )
        outputs = [{"y 'z": expected(sample, dtype)} for sample in range(GOLDEN)]
        write_golden(folder, artifact, [{"x": o["y 'z"] - np.asarray(1, dtype)} for o in outputs], outputs)
        artifacts.append(artifact)
    if runner is not None:
        (folder / "qat_run").write_bytes(runner)
    write_deploy(folder, family, name, artifacts, GOLDEN)
    return folder


def in_script(package: Path, folder: Path, commands: str, shell: str = "sh") -> str:
    """What commands say that call functions of a package's deploy.sh, without a phone; their files lie in a folder."""
    functions = (package / "deploy.sh").read_text().removesuffix('main "$@"\n')
    (folder / "work").mkdir()
    (folder / "functions.sh").write_text(f"{functions}\nWORK={folder}/work\n{commands}\n")
    done = subprocess.run([shell, str(folder / "functions.sh")], capture_output=True, text=True, check=False)
    assert done.stderr == "", done.stderr
    return done.stdout


class Phones:
    """A drawer of phones with a fake adb, see `fake_adb`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adb = Path(__file__).with_name("fake_adb")
        (folder / "phones").mkdir(parents=True)

    def add(self, serial: str = "A1", files: Mapping[str, str] | None = None, **phone: Any) -> Path:
        """Add a phone with 64 bits and these properties, files and troubles; returns its file system."""
        home = self.folder / "phones" / serial
        root = home / "root"
        (root / BASE).mkdir(parents=True)
        free = phone.pop("free", 10_000_000)
        phone["df"] = f"/dev/dm-5 99999999 1000 {free} 1% /data" if free is not None else "/data 12.0G 3.2G 8.8G 4096"
        properties = {f"properties/{k}": v for k, v in {**ARM64, **phone.pop("properties", {})}.items()}
        below = {f"root/{name}": text for name, text in (files or {}).items()}
        for name, text in {**properties, **below, **phone}.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(f"{text}\n" if text and not name.startswith("root/") else str(text))
        return root

    def environment(self) -> dict[str, str]:
        """The environment in which adb is the fake one, and nothing else is set."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        return {**kept, "ADB": str(self.adb), "FAKE_ADB": str(self.folder), "TMPDIR": str(self.folder)}

    def deploy(
        self, package: Path, *words: str, shell: str = "sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a package's deploy.sh."""
        return subprocess.run(
            [shell, str(package / "deploy.sh"), *words],
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What was asked of adb: the words of each call between bars."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def pushed(self, serial: str = "A1", name: str = "net") -> dict[str, bytes]:
        """Files of the run directory on a phone."""
        root = self.folder / "phones" / serial / "root" / BASE / f"qat-{name}"
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    def left(self, serial: str = "A1") -> list[str]:
        """What is in the phone's base directory."""
        return sorted(p.name for p in (self.folder / "phones" / serial / "root" / BASE).iterdir())
