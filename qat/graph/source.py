"""Lines of the user's code: which one runs, which one raised."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

_TORCH = str(Path(torch.__file__).parent)
_TORCH_MODULES = str(Path(torch.__file__).parent / "nn" / "modules")
_OWN = str(Path(__file__).parent)


def calling_source(entry: CodeType) -> str:
    """`file:line` of the innermost running line of the user's code.

    Args:
        entry: Code object at which the search ends.

    Returns:
        The line; that of torch's container where only that is the caller; empty where there is neither.
    """
    frame: FrameType | None = sys._getframe(1)
    container = ""
    while frame is not None and frame.f_code is not entry:
        name = frame.f_code.co_filename
        if _is_users(name):
            return f"{shorten(name)}:{frame.f_lineno}"
        if not container and name.startswith(_TORCH_MODULES) and frame.f_code.co_name == "forward":
            container = f"{shorten(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return container


def shorten(path: str) -> str:
    """Path of a source file relative to where Python found it."""
    best = ""
    for place in (*sys.path, str(Path.cwd())):
        prefix = str(Path(place or Path.cwd())).rstrip("/") + "/"
        if path.startswith(prefix) and len(prefix) > len(best):
            best = prefix
    return path[len(best) :]


def source_of(error: BaseException) -> str:
    """`file:line` of the innermost line of the user's code in a traceback."""
    found = container = ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if _is_users(name):
            found = f"{shorten(name)}:{trace.tb_lineno}"
        elif name.startswith(_TORCH_MODULES):
            container = f"{shorten(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found or container


def _is_users(path: str) -> bool:
    return not path.startswith((_TORCH + "/", _OWN + "/", "<frozen", "<string>")) and "/contextlib.py" not in path
