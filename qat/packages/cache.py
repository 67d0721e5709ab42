"""Where packages keep what takes long to make and can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache, `$XDG_CACHE_HOME/qat/<name>` (`~/.cache` by default); it may not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "qat" / name
