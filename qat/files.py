"""Writing files so that a failure never leaves half of one, and reading JSON strictly."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qat.errors import OutputError, QatError


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temporary path beside `final` to write to; rename it to `final` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `final` is left as it was.

    Raises:
        OutputError: The folder cannot be made or written to, `final` is a folder, or the disk is full.
    """
    final = Path(final)
    if not final.name:
        raise OutputError(f"cannot write {str(final)!r}", "give the path of a file")
    temporary = final.with_name(f".{final.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # made here and not by tempfile, whose files nobody else may read
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise OutputError(f"cannot write {final} ({error.strerror})", "choose a writable folder") from None
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(final)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise  # of another file that the block reads
        mend = "give the path of a file" if final.is_dir() else "free some space or choose another folder"
        raise OutputError(f"cannot write {final} ({error.strerror or error})", mend) from None
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


def read_json(path: Path, error: type[QatError], mend: str) -> object:
    """Read a JSON file, refusing what Python's reader lets pass: NaN, Infinity, and a key twice in one object.

    Args:
        path: The file.
        error: The kind of error to raise.
        mend: What the message of a malformed file tells the user to do.

    Raises:
        QatError: Of the kind `error`: the file cannot be read, or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data: object = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except OSError as failure:
        raise error(f"cannot read {path} ({failure.strerror})", "give an existing file") from None
    except ValueError as failure:
        raise error(f"{path} is not JSON ({failure})", mend) from None
    except RecursionError:
        raise error(f"{path} is not JSON (nested too deeply)", mend) from None
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found
