"""The folder of a package: made beside its place, and moved there whole."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import OutputError, PackageError
from qat.packages.manifest import FILE, read_manifest


@contextmanager
def staged_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `final` to fill; it becomes `final` when the block ends well.

    On any exception the folder is removed and `final` is left as it was.

    Args:
        final: Where the package is to be. It does not exist, is an empty folder, or is a package that `overwrite`
            allows to replace.
        overwrite: Replace a package.

    Raises:
        OutputError: `final` is something else, or cannot be written.
    """
    final = Path(final)
    _check(final, overwrite)
    stage = final.parent / f".{final.name}.{secrets.token_hex(4)}.part"
    old = final.parent / f".{final.name}.{secrets.token_hex(4)}.old"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {final} ({error.strerror})", "choose a writable folder") from None
    try:
        yield stage
        try:
            if final.exists():
                final.rename(old)
            stage.rename(final)
        except OSError as error:
            if old.exists() and not final.exists():
                old.rename(final)
            raise OutputError(f"cannot write {final} ({error.strerror})", "choose another folder") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check(final: Path, overwrite: bool) -> None:
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError(f"{final} exists and is no folder", "choose another place")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not (final / FILE).is_file():
        raise OutputError(f"{final} exists and is no package of qat", "choose another folder, nothing was touched")
    try:
        read_manifest(final)
    except PackageError as error:
        raise OutputError(f"{final} exists and is no package of qat ({error})", "choose another folder") from None
    if not overwrite:
        raise OutputError(f"the package {final} exists", "say overwrite, or choose another folder")
