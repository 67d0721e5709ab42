"""Phases of calibration and training, and frozen batch norms."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.errors import CheckpointError, StateError
from qat.quantizers.base import Phase, Quantizer
from qat.quantizers.packing import pack_state, unpack_state

#: no quantizer does anything
FLOAT = Phase()
#: calibration: values are observed and stay float
OBSERVE = Phase(observing=True)
#: fake quantization with ranges that stay as they are
QUANTIZE = Phase(quantizing=True)
#: values stay float, ranges follow the activations in training mode
FOLLOW = Phase(tracking=True)
#: fake quantization with ranges that follow the activations in training mode, or are learned
TRACK = Phase(quantizing=True, tracking=True)


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Put every quantizer in `model` into a phase."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_phase(phase)


def freeze_batch_norm(model: nn.Module, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Put batch norms into evaluation mode: their running statistics are used and no longer change.

    Their weights and biases go on learning. `Module.train()` undoes this, so a model that keeps them frozen
    calls this function again, with the returned names, at the end of its own `train`.

    Args:
        model: The model.
        names: Module paths of the batch norms; all of them where None.

    Returns:
        The names of the batch norms that are now frozen, in the order of the model.

    Raises:
        StateError: There is no batch norm of such a name.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    wanted = set(found) if names is None else set(names)
    unknown = sorted(wanted - set(found))
    if unknown:
        raise StateError(f"the model has no batch norm {unknown[0]!r}", "give module paths as in named_modules()")
    for name in wanted:
        found[name].eval()
    return tuple(name for name in found if name in wanted)


def pack_frozen(names: Iterable[str]) -> Tensor:
    """Return the names of frozen batch norms as a uint8 tensor, for extra state."""
    return pack_state({"frozen_batch_norms": list(names)})


def unpack_frozen(packed: object) -> tuple[str, ...]:
    """Read what `pack_frozen` wrote.

    Raises:
        CheckpointError: It is malformed.
    """
    names = unpack_state(packed, "frozen_batch_norms").get("frozen_batch_norms")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            "the list of frozen batch norms is malformed", "load a checkpoint that this version of qat wrote"
        )
    return tuple(names)
