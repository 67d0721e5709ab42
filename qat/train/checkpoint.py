"""Checkpoints: safetensors with a JSON header of ours; weights of others are read without unpickling code."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from qat.errors import CheckpointError
from qat.files import atomic_write_bytes

SCHEMA_VERSION = 2
#: key of our JSON document in the metadata of a safetensors header
_KEY = "qat"
#: names under which training scripts commonly nest the weights
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: Tensors by `state_dict` key.
        fingerprint: Fingerprint of the model that it was made from.
        info: What its writer noted (JSON values).
    """

    tensors: Mapping[str, Tensor]
    fingerprint: str
    info: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, shapes and dtypes of a model's state, which tells models apart."""
    lines = sorted(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _checksum(tensors: Mapping[str, Tensor], info: str) -> str:
    """Return a hash of the bits of all tensors and of the notes."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        # a view of bytes, for numpy knows no bfloat16
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _notes(info: object) -> str:
    return json.dumps(info, sort_keys=True)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: File to write, `*.safetensors`.
        tensors: Tensors by `state_dict` key; those that share memory are stored each for itself.
        info: JSON values to note beside them.

    Raises:
        CheckpointError: A value of the state is not a tensor.
        OutputError: The file cannot be written.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name!r} of the state is a {type(tensor).__name__}", "keep state in tensors only")
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    document = {
        "schema": "qat-checkpoint",
        "version": SCHEMA_VERSION,
        "fingerprint": fingerprint(tensors),
        "info": dict(info or {}),
        "sha256": _checksum(own, _notes(dict(info or {}))),
    }
    # one key only: safetensors writes several in any order, and the same state shall give the same bytes
    atomic_write_bytes(path, save_safetensors(own, {_KEY: json.dumps(document)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        CheckpointError: The file is missing, truncated, changed, no safetensors file, no checkpoint, or of another
            version.
    """
    tensors, metadata = _read_safetensors(path)
    try:
        document = json.loads(metadata[_KEY])
        version, mark, info = document["version"], document["fingerprint"], document["info"]
        checksum = document.get("sha256")
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path} is not a checkpoint of qat", "give one that `qat run` wrote") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path} has version {version!r} of the schema", f"this qat reads {SCHEMA_VERSION}")
    if mark != fingerprint(tensors):
        raise CheckpointError(f"{path} does not hold the tensors that its header describes", "write it again")
    if checksum != _checksum(tensors, _notes(info)):
        raise CheckpointError(f"{path} is damaged: its checksum is another", "copy the file again")
    return Checkpoint(tensors, str(mark), dict(info))


def check_same_model(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Check that a state has exactly the names and shapes that a model has.

    Raises:
        CheckpointError: It has not; the first keys that differ are named.
    """
    missing = [k for k in expected if k not in given]
    surplus = [k for k in given if k not in expected]
    shapes = [
        k
        for k in expected
        # the extra state of a module is text of any length
        if k in given and not k.endswith("_extra_state") and expected[k].shape != given[k].shape
    ]
    if not (missing or surplus or shapes):
        return
    words = []
    if shapes:
        key = shapes[0]
        words.append(f"{key} is {tuple(given[key].shape)} where the model has {tuple(expected[key].shape)}")
    if missing:
        words.append(f"it lacks {_first(missing)}")
    if surplus:
        words.append(f"it has the unknown {_first(surplus)}")
    raise CheckpointError(f"{source} is of another model: {', '.join(words)}", "give the checkpoint of this model")


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state into a model, every key and no other; the model is untouched where that fails.

    Raises:
        CheckpointError: The state is of another model.
    """
    check_same_model(model.state_dict(), tensors, source)
    model.load_state_dict(dict(tensors), strict=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load float weights from a safetensors file or from a `torch.save`d state_dict.

    Weights that a training script nested (`{"state_dict": ...}`), or saved from a data-parallel model
    (`module.`), are found.

    Raises:
        CheckpointError: The file is missing, truncated, holds more than tensors, is of another model, or
            holds nan or inf.
    """
    tensors = _plain(model, read_weights(path))
    check_same_model(model.state_dict(), tensors, str(path))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds nan or inf", "give weights that are finite")
    load_state(model, tensors, str(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a `torch.save`d state_dict, running nothing that is in it.

    Raises:
        CheckpointError: The file is missing, truncated, or holds anything but tensors in dictionaries.
    """
    if _looks_like_safetensors(path):
        return _read_safetensors(path)[0]
    try:
        data: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and was not opened further",
            "save its state_dict alone, as safetensors",
        ) from None
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever a damaged file leads its reader to
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is truncated or no checkpoint ({cause})", "copy the file again") from None
    for _ in range(2):
        nested = next((k for k in _NESTED if isinstance(data, dict) and isinstance(data.get(k), dict)), None)
        if nested is None or not isinstance(data, dict):
            break
        data = data[nested]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path} is not a state_dict", "save model.state_dict()")
    return {str(k): v for k, v in data.items()}


def _plain(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if (
        tensors
        and all(k.startswith("module.") for k in tensors)
        and not any(k.startswith("module.") for k in model.state_dict())
    ):
        return {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors


def _open(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})", "give an existing file") from None


def _looks_like_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})", "give an existing file") from None
    # 8 bytes of header length, then the JSON object of the header
    return len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    raw = _open(path)
    try:
        tensors = load_safetensors(raw)
        length = struct.unpack("<Q", raw[:8])[0]
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, struct.error, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})", "copy the file again") from None
    return tensors, metadata
