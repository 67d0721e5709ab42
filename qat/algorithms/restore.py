"""Putting a prepared model back as it was where an algorithm fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from qat.graph.prepared import PreparedModel
from qat.quantizers import Quantizer


@contextmanager
def modes_restored(qmodel: PreparedModel) -> Iterator[None]:
    """Put back training modes, and the phases too where something goes wrong."""
    modes = {module: module.training for module in qmodel.modules()}
    phases = {module: module.phase for module in modes if isinstance(module, Quantizer)}
    try:
        yield
    except BaseException:
        for quantizer, phase in phases.items():
            quantizer.set_phase(phase)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def restored(qmodel: PreparedModel) -> Iterator[None]:
    """Put back training modes and phases, and where something goes wrong all parameters and buffers too."""
    state: dict[str, Tensor] = {key: value.detach().clone() for key, value in qmodel.state_dict().items()}
    phases = {module: module.phase for module in qmodel.modules() if isinstance(module, Quantizer)}
    with modes_restored(qmodel):
        try:
            yield
        except BaseException:
            qmodel.load_state_dict(state)
            raise
        for quantizer, phase in phases.items():
            quantizer.set_phase(phase)
