"""The sources of the runner for devices: where they are, their copy in a package, and programs built of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qat.errors import OutputError, StateError
from qat.files import atomic_path
from qat.packages.cache import cache_folder
from qat.packages.executor import Missing

#: below a package's folder
RUNNER = "runner"
#: the program for 64-bit ARM Linux, static, below a package's folder
PROGRAM = "runner/bin/aarch64-linux/qat_run"
#: what the runner is built of, below csrc/: the kernels of training are left out
_PARTS = ("CMakeLists.txt", "kernel_options.txt", "cmake/*.cmake", "kernels/integer/*", "runtime/*", "runner/*")
_LINES = 3


@dataclass(frozen=True)
class Machine:
    """What a program is built for.

    Attributes:
        name: The processor's architecture.
        compiler: Its C++ compiler.
        toolchain: CMake's toolchain file, below the sources; "" for this machine.
    """

    name: str
    compiler: str
    toolchain: str = ""


AARCH64 = Machine("aarch64", "aarch64-linux-gnu-g++", "cmake/aarch64-linux-gnu.cmake")


def this_machine() -> Machine:
    """Return the machine that this process runs on; `CXX` names another compiler than g++."""
    return Machine(platform.machine(), os.environ.get("CXX", "g++"))


def sources_folder() -> Path:
    """Return the folder of the sources: in an installed package beside this file, in a checkout `csrc`.

    Raises:
        StateError: There is neither.
    """
    here = Path(__file__).resolve()
    for folder in (here.with_name("csrc"), here.parents[2] / "csrc"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise StateError("the runner's sources are not installed", "install qat again, from its wheel or its repository")


def source_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Give path, with `/`, and content of every source of the runner below a folder, sorted by path."""
    found = {path.relative_to(folder).as_posix(): path for part in _PARTS for path in folder.glob(part)}
    for name, path in sorted(found.items()):
        if path.is_file():
            yield name, path.read_bytes()


def sources_hash(folder: Path) -> str:
    """Return the SHA-256 of the sources below a folder, names and contents."""
    digest = hashlib.sha256()
    for name, content in source_files(folder):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def copy_sources(folder: Path) -> Path:
    """Copy what the runner is built of into `folder/runner`, so that a user's own toolchain can build it.

    Raises:
        StateError: The sources are not installed.
        OutputError: The folder cannot be written.
    """
    target = Path(folder) / RUNNER
    for name, content in source_files(sources_folder()):
        path = target / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror})", "choose a writable folder") from None
    return target


def missing_tools(machine: Machine) -> Missing | None:
    """Return what building for a machine needs and has not."""
    packages = {machine.compiler: f"g++{'-aarch64-linux-gnu' if machine.toolchain else ''}", "cmake": "cmake"}
    if shutil.which("ninja") is None:
        packages["make"] = "make"
    lacking = {tool: package for tool, package in packages.items() if shutil.which(tool) is None}
    if not lacking:
        return None
    return Missing(
        f"{', '.join(lacking)}, to build the runner",
        f"scripts/setup --system, or as root: apt-get install {' '.join(lacking.values())}",
    )


def build_runner(machine: Machine = AARCH64, folder: Path | None = None) -> Path:
    """Build `qat_run` and return its path; what was built of the same sources by the same compiler is kept and reused.

    The programs are in `$XDG_CACHE_HOME/qat/runner`.

    Args:
        machine: What for.
        folder: The sources; None for those of this installation.

    Raises:
        StateError: A tool is missing, or the build fails; the compiler's words are given.
        OutputError: The cache cannot be written.
    """
    folder = sources_folder() if folder is None else Path(folder)
    lacking = missing_tools(machine)
    if lacking is not None:
        raise StateError(f"not here: {lacking.what}", lacking.mend)
    version = _run([machine.compiler, "--version"]).splitlines()[0]
    key = hashlib.sha256(f"{sources_hash(folder)}\0{machine}\0{version}".encode()).hexdigest()
    program = cache_folder("runner") / key[:32] / "qat_run"
    if not program.is_file():
        with _locked(program.parent):
            # another process may have built it meanwhile
            if not program.is_file():
                _build(machine, folder, program)
    return program


def copy_program(folder: Path) -> Path:
    """Build `qat_run` for 64-bit ARM Linux and copy it into a package's folder.

    Raises:
        StateError: As `build_runner`.
        OutputError: The folder cannot be written.
    """
    program, target = build_runner(AARCH64), Path(folder) / PROGRAM
    with atomic_path(target) as temporary:
        shutil.copyfile(program, temporary)
        temporary.chmod(0o755)
    return target


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build what goes into a folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        mend = "set XDG_CACHE_HOME to a writable folder"
        raise OutputError(f"cannot write {folder} ({error.strerror})", mend) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(machine: Machine, folder: Path, program: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="qat-runner-") as build, atomic_path(program) as temporary:
        configure = ["cmake", "-S", str(folder.resolve()), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        if machine.toolchain:
            configure.append(f"-DCMAKE_TOOLCHAIN_FILE={folder.resolve() / machine.toolchain}")
        else:
            configure.append(f"-DCMAKE_CXX_COMPILER={machine.compiler}")
        if shutil.which("ninja") is not None:
            configure += ["-G", "Ninja"]
        _run(configure)
        _run(["cmake", "--build", build, "--target", "qat_run", "--parallel", str(os.cpu_count() or 1)])
        shutil.copyfile(Path(build) / "qat_run", temporary)
        temporary.chmod(0o755)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        said = " / ".join(lines[:_LINES]) or "no reason is given"
        raise StateError(
            f"{' '.join(command[:3])} failed: {said}", "see that the compiler works, and is g++ 9 or later"
        )
    return done.stdout
