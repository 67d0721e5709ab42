"""The stand-in for NeuroPilot's library, compiled by this machine's C compiler and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from qat.errors import ExportError
from qat.files import atomic_path

SOURCE = Path(__file__).with_name("stand_in.c")
#: the first name that MediaTek's plug-in looks for and that no phone's library has on this machine
NAME = "libneuron_adapter.so"
_OPTIONS = ("-std=c99", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")


def compiler() -> list[str] | None:
    """Return the C compiler's command: `CC`, else `cc`, `gcc` or `clang` of the PATH; None where there is none."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    found = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    return found[:1] or None


def cache_folder() -> Path:
    """Return the folder of what is compiled once: `XDG_CACHE_HOME/qat`, in `~/.cache` if unset."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "qat"


def stand_in() -> Path:
    """Return the stand-in library, compiled now where the cache has none of these sources and this compiler.

    Raises:
        ExportError: There is no C compiler, or it does not compile the library.
        OutputError: The cache cannot be written.
    """
    command = compiler()
    if command is None:
        raise ExportError("the recording stand-in for libneuron_adapter.so needs a C compiler", "install gcc or clang")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((command, _OPTIONS)).encode()).hexdigest()[:16]
    library = cache_folder() / f"neuron-{key}" / NAME
    if not library.exists():
        with atomic_path(library) as temporary:
            done = subprocess.run(
                [*command, *_OPTIONS, "-o", str(temporary), str(SOURCE)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                cause = " ".join(done.stderr.split())[:200] or f"exit status {done.returncode}"
                raise ExportError(f"{command[0]} does not compile {SOURCE.name} ({cause})", "set CC to a C99 compiler")
    return library
