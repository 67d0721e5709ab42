"""How far a quantized model's outputs are from the float model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from qat.algorithms.restore import modes_restored
from qat.algorithms.walk import float_reference
from qat.graph.prepared import PreparedModel
from qat.quantizers import QUANTIZE, Quantizer

Batches = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Distance:
    """How far outputs are from those of the float model, in the mean over outputs.

    Attributes:
        squared: Squared error relative to the float model's sum of squares.
        divergence: Kullback-Leibler divergence between the softmax of the float and of the quantized model's scores,
            in nats, of outputs (N, classes); 0 where there are none. A shift of all scores, which decides nothing, is
            an error to the one and none to the other.
    """

    squared: float
    divergence: float

    def is_worse_than(self, other: Distance) -> bool:
        """Whether it is farther by either measure."""
        return self.squared > other.squared or self.divergence > other.divergence


class OutputError:
    """Compares a model's outputs, as it is changed, with the float model's.

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
    def measure(self) -> Distance:
        """Return the distance of the model as it is now, on its present ranges."""
        phases = {m: m.phase for m in self._qmodel.modules() if isinstance(m, Quantizer)}
        with modes_restored(self._qmodel):
            self._qmodel.eval()
            self._qmodel.set_phase(QUANTIZE)
            found = [_floats(self._qmodel(*_copies(inputs))) for inputs in self._batches]
        for quantizer, phase in phases.items():
            quantizer.set_phase(phase)
        squared, divergences = [], []
        for have, want in zip(zip(*found, strict=True), zip(*self._wanted, strict=True), strict=True):
            size = sum(float(w.double().square().sum()) for w in want)
            error = sum(float((h - w).double().square().sum()) for h, w in zip(have, want, strict=True))
            squared += [error / size] if size > 0.0 else []
            if want[0].dim() == 2 and want[0].shape[1] > 1:
                total = sum(_divergence(h, w) for h, w in zip(have, want, strict=True))
                divergences.append(total / sum(len(w) for w in want))
        return Distance(_mean(squared), _mean(divergences))


def _divergence(scores: Tensor, wanted: Tensor) -> float:
    found, target = (x.double().log_softmax(1) for x in (scores, wanted))
    return float(functional.kl_div(found, target, reduction="sum", log_target=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _floats(outputs: Any) -> list[Tensor]:
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]


def _copies(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # an operator may work in place
    return [x.clone() for x in inputs]
