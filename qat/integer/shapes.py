"""Shapes of single data-movement steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qat.errors import ExportError


def step_shape(kind: str, attrs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape after one data-movement step; a size -k is k times the batch size.

    Raises:
        ExportError: The step is none that only moves data.
    """
    if kind in ("identity", "roll", "rescale", "clamp"):
        return shape
    if kind == "transpose":
        return tuple(shape[p] for p in attrs["perm"])
    if kind == "expand":
        return tuple(attrs["shape"])
    if kind not in ("reshape", "slice"):
        raise ExportError(f"{kind} inside a chain of data movements", "report this model to the developers of qat")
    # two batch sizes tell how many samples the open size holds
    results = [_run(kind, attrs, tuple(-s * batch if s < 0 else s for s in shape)) for batch in (2, 3)]
    return tuple(a if a == b else a - b for a, b in zip(*results, strict=True))


def _run(kind: str, attrs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "reshape":
        return tuple(torch.empty(shape, device="meta").reshape(attrs["shape"]).shape)
    sizes = list(shape)
    for axis, start, end, step in zip(attrs["axes"], attrs["starts"], attrs["ends"], attrs["steps"], strict=True):
        sizes[axis] = len(range(sizes[axis])[slice(start, end, step)])
    return tuple(sizes)
