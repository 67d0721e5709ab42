"""Writing files so that a failure never leaves half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qat.errors import OutputError


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temporary path beside `final` to write to; rename it to `final` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `final` is left as it was.

    Raises:
        OutputError: The folder does not exist or is read-only, or the disk is full.
    """
    final = Path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {final} ({error.strerror})", "choose a writable folder") from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(final)
    except OSError as error:
        raise OutputError(
            f"cannot write {final} ({error.strerror or error})", "free some space or choose another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    atomic_write_bytes(path, content.encode("utf-8"))
