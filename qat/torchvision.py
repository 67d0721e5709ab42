"""The only door to torchvision.

A torchvision built for another torch (such as the CUDA build beside a CPU torch) fails to import with "operator
torchvision::nms does not exist", because it describes detection operators whose compiled code could not be loaded.
Their schemas alone are enough for everything else: models, transforms and data sets.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

from qat.errors import QatError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision(submodule: str = "") -> ModuleType:
    """Import torchvision, or one of its submodules, also where its compiled operators cannot be loaded.

    Args:
        submodule: Such as `models` or `transforms.v2`; empty for torchvision itself.

    Raises:
        QatError: torchvision is not installed, does not fit the installed torch, or has no such submodule.
    """
    name = f"torchvision.{submodule}" if submodule else "torchvision"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _unusable(name, error) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise _unusable(name, error) from error
    # the failed import leaves half-initialised submodules behind
    for loaded in [key for key in sys.modules if key == "torchvision" or key.startswith("torchvision.")]:
        del sys.modules[loaded]
    _declare_operators()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise _unusable(name, error) from error


@functools.cache  # the schemas live as long as the library object, and a second declaration is an error
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def _unusable(name: str, error: Exception) -> QatError:
    return QatError(
        f"cannot import {name}: {str(error).splitlines()[0]}", "install the torchvision that fits the installed torch"
    )
