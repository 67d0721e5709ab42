"""How far a quantized model's outputs are from the float model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.algorithms.restore import modes_restored
from qat.algorithms.walk import float_reference
from qat.graph.prepared import PreparedModel
from qat.quantizers import QUANTIZE, Quantizer

Batches = Sequence[tuple[Tensor, ...]]


class OutputError:
    """The mean squared error of a model's outputs, relative to what the float model gives; each output counts alike.

    Args:
        qmodel: A calibrated model, as it is before it is changed.
        batches: From `qat.algorithms.sweep.gather`.
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
    """

    def __init__(self, qmodel: PreparedModel, batches: Batches, float_model: nn.Module | None) -> None:
        self._qmodel, self._batches = qmodel, batches
        reference = float_reference(qmodel, float_model)
        with torch.no_grad():
            self._wanted = [_floats(reference(*_copies(inputs))) for inputs in batches]

    @torch.no_grad()
    def measure(self) -> float:
        """Return the error of the model as it is now, on its present ranges."""
        errors: list[float] = []
        sizes: list[float] = []
        phases = {m: m.phase for m in self._qmodel.modules() if isinstance(m, Quantizer)}
        with modes_restored(self._qmodel):
            self._qmodel.eval()
            self._qmodel.set_phase(QUANTIZE)
            for inputs, wanted in zip(self._batches, self._wanted, strict=True):
                found = _floats(self._qmodel(*_copies(inputs)))
                errors = _added(
                    errors, [float((y - w).double().square().sum()) for y, w in zip(found, wanted, strict=True)]
                )
                sizes = _added(sizes, [float(w.double().square().sum()) for w in wanted])
        for quantizer, phase in phases.items():
            quantizer.set_phase(phase)
        shares = [error / size for error, size in zip(errors, sizes, strict=True) if size > 0.0]
        return sum(shares) / max(1, len(shares))


def _floats(outputs: Any) -> list[Tensor]:
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]


def _copies(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # an operator may work in place
    return [x.clone() for x in inputs]


def _added(sums: list[float], more: list[float]) -> list[float]:
    return more if not sums else [a + b for a, b in zip(sums, more, strict=True)]
