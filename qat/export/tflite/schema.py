"""The libraries that a `.tflite` file is written and executed with, and how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from qat.errors import ExportError

_INSTALL = "install them: pip install 'qat[litert]' (ai-edge-litert and flatbuffers)"


def _module(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise ExportError(f"{purpose} needs {missing}, which is not installed", _INSTALL) from error


def schema() -> Any:
    """The module of the TFLite schema's object API (`ai_edge_litert.schema_py_generated`).

    Raises:
        ExportError: It is not installed; the message says how to install it.
    """
    return _module("ai_edge_litert.schema_py_generated", "writing a .tflite file")


def flatbuffers() -> Any:
    """The flatbuffers library.

    Raises:
        ExportError: It is not installed; the message says how to install it.
    """
    return _module("flatbuffers", "writing a .tflite file")


def interpreter() -> Any:
    """The module of LiteRT's interpreter.

    Raises:
        ExportError: It is not installed; the message says how to install it.
    """
    return _module("ai_edge_litert.interpreter", "executing a .tflite file")
