"""Going on with a reconstruction that was interrupted, at its unit and to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.algorithms.rounding import UnitRounding
from qat.errors import CheckpointError
from qat.graph.prepared import PreparedModel
from qat.train.checkpoint import load_checkpoint, save_checkpoint

_SCHEMA_VERSION = 1


def digest(
    qmodel: PreparedModel,
    data: Sequence[tuple[Tensor, ...]],
    options: Mapping[str, Any],
    float_model: nn.Module | None = None,
) -> str:
    """Return a hash of all that decides the result: options, the models' states, and the samples."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    states = [*qmodel.state_dict().items(), *(float_model.state_dict().items() if float_model is not None else ())]
    for key, value in states:
        found.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        found.update(_bytes(value))
    for tensor in (x for inputs in data for x in inputs):
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Progress:
    """What a reconstruction has done, in a file that is written anew after each unit.

    Args:
        path: The file, safetensors; None for none.
        mark: From `digest`.

    Raises:
        CheckpointError: The file is there and is damaged, of another version, or of another model, data or options.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self.path, self.mark = path, mark
        self.done: dict[str, UnitRounding] = {}
        self._tensors: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        saved = load_checkpoint(path)
        info = saved.info
        if info.get("schema") != "qat-reconstruction" or info.get("version") != _SCHEMA_VERSION:
            raise CheckpointError(f"{path} is no reconstruction that this version of qat reads", "give another path")
        if info.get("digest") != self.mark:
            raise CheckpointError(
                f"{path} is of another model, other data or other options", "remove it to start anew, or give its own"
            )
        units = [UnitRounding(**{**unit, "weights": tuple(unit["weights"])}) for unit in info["units"]]
        self.done = {unit.name: unit for unit in units}
        self._tensors = dict(saved.tensors)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what was added with a unit."""
        prefix = f"{name}:"
        return {key.removeprefix(prefix): value for key, value in self._tensors.items() if key.startswith(prefix)}

    def add(self, unit: UnitRounding, tensors: Mapping[str, Tensor]) -> None:
        """Note a finished unit, and write the file.

        Raises:
            OutputError: The file cannot be written.
        """
        self.done[unit.name] = unit
        self._tensors |= {f"{unit.name}:{key}": value for key, value in tensors.items()}
        if self.path is not None:
            info = {
                "schema": "qat-reconstruction",
                "version": _SCHEMA_VERSION,
                "digest": self.mark,
                "units": [asdict(done) for done in self.done.values()],
            }
            save_checkpoint(self.path, self._tensors, info)
