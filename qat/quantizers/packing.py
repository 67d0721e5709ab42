"""Plain data as a tensor, for extra state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat.errors import CheckpointError


def pack_state(state: Mapping[str, Any]) -> Tensor:
    """Return a JSON-able mapping as a uint8 tensor, shape (bytes,).

    Extra state in this form passes `torch.load(weights_only=True)` and safetensors alike.
    """
    return torch.tensor(list(json.dumps(dict(state), sort_keys=True).encode()), dtype=torch.uint8)


def unpack_state(packed: object, name: str) -> dict[str, Any]:
    """Read what `pack_state` wrote.

    Raises:
        CheckpointError: It is not such a tensor; `name` is named.
    """
    try:
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
            raise ValueError("not a vector of uint8")
        state = json.loads(bytes(packed.tolist()))
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"the extra state of {name!r} is malformed ({error})",
            "load a checkpoint that this version of qat wrote",
        ) from None
    return state
