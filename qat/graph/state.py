"""Checking saved state before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.errors import CheckpointError
from qat.quantizers import Quantizer, unpack_frozen

_EXTRA = "_extra_state"
_MEND = "give the state of this model, prepared with the same target and scheme"


def check_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Check that the state of a prepared model fits another one.

    Args:
        model: The prepared model.
        state: The state.
        strict: Keys must be the same.

    Raises:
        CheckpointError: A key is missing or unknown, or a value does not fit; the first one is named.
    """
    mine = model.state_dict()
    if strict:
        _check_keys(mine, state, "the checkpoint")
    for key in mine:
        if key in state and not key.endswith(_EXTRA):
            _check_value(key, mine[key], state[key])
    for name, module in model.named_modules(remove_duplicate=False):
        key = f"{name}.{_EXTRA}"
        if isinstance(module, Quantizer) and key in state:
            module.read_extra_state(state[key])
    if _EXTRA in state:
        norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        for name in unpack_frozen(state[_EXTRA]):
            if name not in norms:
                raise CheckpointError(f"the checkpoint freezes {name!r} and the model has no batch norm of it", _MEND)


def check_tensors(mine: Mapping[str, Tensor], given: Mapping[str, Any], what: str) -> None:
    """Check that tensors can be copied into others, key by key.

    Args:
        mine: The tensors to be written.
        given: The tensors to be read.
        what: Noun for messages.

    Raises:
        CheckpointError: A key is missing or unknown, or a shape differs; the first one is named.
    """
    _check_keys(mine, given, what)
    for key, value in mine.items():
        _check_value(key, value, given[key])


def _check_keys(mine: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    for key in mine:
        if key not in given:
            raise CheckpointError(f"{what} lacks {key!r}", _MEND)
    for key in given:
        if key not in mine:
            raise CheckpointError(f"{what} has the unknown key {key!r}", _MEND)


def _check_value(key: str, mine: Tensor, given: object) -> None:
    if not isinstance(given, Tensor):
        raise CheckpointError(f"{key!r} of the state is a {type(given).__name__}", "give tensors only")
    if mine.shape != given.shape:
        raise CheckpointError(f"{key!r} has shape {tuple(given.shape)} and not {tuple(mine.shape)}", _MEND)
