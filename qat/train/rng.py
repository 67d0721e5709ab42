"""The state of every random number generator that training may draw from."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import CheckpointError
from qat.train import processes


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch (CPU, and the GPU that is in use), Python and numpy: tensors, and JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - users' transforms draw from the global generator
    assert isinstance(legacy, dict)
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    tensors["numpy"] = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    values = {
        "python": [version, gauss],
        "numpy": [int(legacy["state"]["pos"]), int(legacy["has_gauss"]), float(legacy["gauss"])],
    }
    return tensors, values


def random_states() -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Return the states of all processes that train together, in their order; every one of them must call this."""
    tensors, values = random_state()
    each = {name: processes.tensor_of_each(state) for name, state in tensors.items()}
    texts = processes.text_of_each(json.dumps(values))
    return [{name: parts[i] for name, parts in each.items()} for i in range(len(texts))], [json.loads(t) for t in texts]


def set_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Take back what `random_state` returned; a GPU's state is left out where there is none.

    Raises:
        CheckpointError: A state is missing or malformed.
    """
    try:
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        version, gauss = values["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        position, has_gauss, last = values["numpy"]
        key = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, last))  # noqa: NPY002 - as above
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of the random numbers is malformed ({error})", "resume from another checkpoint"
        ) from None
