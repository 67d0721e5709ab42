"""What the algorithms that choose the rounding of weights share: which layers, taking codes over, and the result."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qat.algorithms.sweep import Visit
from qat.algorithms.units import Unit
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.batches import sample_count
from qat.graph.prepared import PreparedModel
from qat.quantizers import FakeQuantize

#: below this many samples a rounding is hardly representative
_FEW = 50


@dataclass(frozen=True)
class Rounded:
    """What an algorithm chose for a unit.

    Attributes:
        codes: Of its weights, int32, by weight key.
        weight_scales: New scales of weights, by weight key; a weight that is missing keeps its own.
        shifts: What to add to each output channel of layers (see `Layer.offset`), by weight key.
        activation_scales: New scales of activations, by the path of their fake quantizer.
    """

    codes: Mapping[str, Tensor]
    weight_scales: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    activation_scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitRounding:
    """What became of one unit.

    Attributes:
        name: Tensor name of its output.
        weights: `state_dict` keys of the weights that were rounded.
        before: Mean squared error of the unit's output against the float model, rounded to nearest.
        after: The same with the new codes.
        kept: The new codes were no better, so the old rounding was kept.
    """

    name: str
    weights: tuple[str, ...]
    before: float
    after: float
    kept: bool = False


@dataclass(frozen=True)
class Rounding:
    """The result of an algorithm that rounds weights; prints as a table.

    Attributes:
        method: Name of the algorithm.
        units: In execution order.
        samples: Number of samples it looked at.
    """

    method: str
    units: tuple[UnitRounding, ...]
    samples: int

    def __str__(self) -> str:
        rows = [("unit", "weights", "error before", "after", "")] + [
            (u.name, " ".join(u.weights), f"{u.before:.4g}", f"{u.after:.4g}", "kept" if u.kept else "")
            for u in self.units
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", f"{self.method} on {self.samples} samples"])


def roundable(qmodel: PreparedModel, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units without those that hold a weight which several layers share, with a warning for each.

    Raises:
        StateError: None is left.
    """
    left = []
    for unit in units:
        shared = next((layer for layer in unit.layers if layer.calls > 1), None)
        if shared is None:
            left.append(unit)
            continue
        warnings.warn(
            f"{shared.key!r} is shared by {shared.calls} layers and stays rounded to nearest (in {unit.name!r})",
            QuantizationWarning,
            stacklevel=3,
        )
    if not left:
        floats = [entry.name for entry in qmodel.plan if entry.role == "weight" and entry.decision == "float"]
        which = f"({floats[0]!r} is float: {qmodel.plan[floats[0]].reason})" if floats else "(it has none)"
        raise StateError(f"the model has no quantized weight to round {which}", "check the scheme and the target")
    return tuple(left)


def count_samples(qmodel: PreparedModel, data: Sequence[tuple[Tensor, ...]], method: str) -> int:
    """Return the number of samples; warn where they are too few to choose a rounding by."""
    count = sum(sample_count(qmodel, inputs) for inputs in data)
    if count < _FEW:
        warnings.warn(
            f"{method} on {count} samples only, which it may fit and no others; {_FEW} or more are advisable",
            QuantizationWarning,
            stacklevel=3,
        )
    return count


def check_option(ok: bool, name: str, value: object, mend: str) -> None:
    """Refuse an option.

    Raises:
        StateError: `ok` is false.
    """
    if not ok:
        raise StateError(f"{name} is {value!r}", mend)


def refuse_nonfinite(visit: Visit) -> None:
    """Refuse data on which a unit's float output is not finite.

    Raises:
        DataError: It is not; the unit is named.
    """
    if not all(bool(torch.isfinite(target).all()) for target in visit.targets):
        raise DataError(f"the float output of {visit.unit.name!r} holds nan or inf", "check the data and the weights")


def take_over(visit: Visit, rounded: Rounded, method: str) -> UnitRounding:
    """Set what was chosen for a unit, unless that makes its output worse.

    Args:
        visit: The unit with its data.
        rounded: What was chosen.
        method: What chose it.

    Returns:
        What became of the unit; where the old rounding is kept, there is a warning too.
    """
    before, weights = visit.error(), tuple(rounded.codes)
    layers = [layer for layer in visit.unit.layers if layer.key in rounded.codes]
    quantizers: list[nn.Module] = [layer.quantizer for layer in layers]
    quantizers += [visit.root.get_submodule(path) for path in rounded.activation_scales]
    states = [{key: value.clone() for key, value in module.state_dict().items()} for module in quantizers]
    parameters = [p for layer in layers for p in (layer.weight, layer.offset(visit.root)) if p is not None]
    values = [p.detach().clone() for p in parameters]
    set_rounding(visit, rounded, method)
    after = visit.error()
    if after <= before:
        return UnitRounding(visit.unit.name, weights, before, after)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    for module, state in zip(quantizers, states, strict=True):
        module.load_state_dict(state)
    warnings.warn(
        f"{method} of {', '.join(weights)} would raise the error of {visit.unit.name!r} from {before:.4g} to "
        f"{after:.4g}; the old rounding is kept",
        QuantizationWarning,
        stacklevel=2,
    )
    return UnitRounding(visit.unit.name, weights, before, after, kept=True)


def set_rounding(visit: Visit, rounded: Rounded, method: str) -> None:
    """Set what was chosen for a unit."""
    for layer in visit.unit.layers:
        codes, shift = rounded.codes.get(layer.key), rounded.shifts.get(layer.key)
        if codes is not None:
            scale = rounded.weight_scales.get(layer.key)
            layer.quantizer.set_codes(layer.weight, codes.to(layer.weight.device), method, scale=scale)
        offset = layer.offset(visit.root)
        if shift is not None and offset is not None:
            offset += shift.to(offset)
    for path, scale in rounded.activation_scales.items():
        quantizer = visit.root.get_submodule(path)
        assert isinstance(quantizer, FakeQuantize)
        encoding = replace(
            quantizer.encoding(), scale=tuple(scale.reshape(-1).tolist()), min=None, max=None, method=method
        )
        quantizer.load_encoding(encoding)
