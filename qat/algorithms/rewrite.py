"""Rewriting the float weights of a prepared model: where they are, and that the model still computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qat.algorithms.channels import ChannelGroups, group_indices
from qat.algorithms.restore import restored
from qat.errors import QuantizationWarning, StateError
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import PreparedModel
from qat.quantizers import FLOAT

#: share of the outputs' root mean square by which rounding may change them
_TOLERANCE = 1e-3


def scale_channels(qmodel: PreparedModel, groups: ChannelGroups, factors: Tensor) -> None:
    """Divide every channel by the factor of its group, in the weights that write it, and multiply those that read it.

    Args:
        qmodel: The model; its float weights are changed.
        groups: Of its channels.
        factors: Positive, float64, (groups.count,); that of group 0 is 1.
    """
    values = qmodel.float_state_dict()
    by_channel = factors[groups.groups]
    with torch.no_grad():
        for writer in groups.writers:
            s = by_channel[writer.ids]
            for parameter in writer.parameters:
                value = values[parameter.key]
                divisor = s if value.dim() == 1 else _spread(writer.op, value, s, outputs=True)
                value.copy_(value.to(torch.float64) / divisor.to(value.device))
        for reader in groups.readers:
            assert reader.op.weight is not None
            value = values[reader.op.weight.key]
            s = _spread(reader.op, value, by_channel[reader.ids], outputs=False)
            value.copy_(value.to(torch.float64) * s.to(value.device))


def _spread(op: GraphOp, weight: Tensor, values: Tensor, *, outputs: bool) -> Tensor:
    """Return values of input or output channels in a shape that broadcasts against a weight."""
    inputs, results = group_indices(op, tuple(weight.shape))
    spread = values[results if outputs else inputs]
    return spread.reshape(*spread.shape, *([1] * (weight.dim() - 2)))


def refuse_calibrated(qmodel: PreparedModel, what: str) -> None:
    """Check that no activation has a range that a rewrite would make wrong.

    Raises:
        StateError: One has; it is named.
    """
    ready = next((n for n, q in qmodel.activation_quantizers().items() if q.ready and q.fixed is None), None)
    if ready is not None:
        raise StateError(f"{ready!r} has a range already, which {what} would make wrong", "do it before calibration")


@contextmanager
def in_float(qmodel: PreparedModel) -> Iterator[None]:
    """Let a model compute in float and in evaluation mode, and put its phases and modes back."""
    with restored(qmodel):
        qmodel.eval()
        qmodel.set_phase(FLOAT)
        yield


@contextmanager
def same_function(qmodel: PreparedModel, what: str) -> Iterator[list[str]]:
    """Check on random inputs that the float model still computes the same after a rewrite; undo it where not.

    The inputs are drawn from a normal distribution (integers: zeros and ones), in evaluation mode.

    Args:
        qmodel: The model.
        what: Name of the rewrite, for the message.

    Yields:
        A list that holds a message after the rewrite was undone.
    """
    before = {key: value.clone() for key, value in qmodel.float_state_dict().items()}
    inputs = random_inputs(qmodel)
    undone: list[str] = []
    wanted = _outputs(qmodel, inputs)

    def restore() -> None:
        with torch.no_grad():
            for key, value in qmodel.float_state_dict().items():
                value.copy_(before[key])

    try:
        yield undone
    except BaseException:
        restore()
        raise
    found = _outputs(qmodel, inputs)
    error = max((_relative(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    if not error <= _TOLERANCE:
        restore()
        undone.append(f"{what} changed the outputs by {error:.2g} of their root mean square and was undone")
        warnings.warn(undone[0], QuantizationWarning, stacklevel=3)


def _relative(found: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.square().mean().sqrt())
    difference = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    return difference / scale if scale > 0.0 else difference


def random_inputs(qmodel: PreparedModel) -> tuple[Tensor, ...]:
    """Return inputs of the model, always the same: normal floats, zeros and ones for integers."""
    generator = torch.Generator().manual_seed(0)
    batch = qmodel.plan.batch_size or 2
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    made = []
    for name in qmodel.opgraph.inputs:
        shape = tuple(-size * batch if size < 0 else size for size in qmodel.opgraph.shapes[name])
        dtype = qmodel.input_dtypes[name]
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(device, dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(device, dtype))
    return tuple(made)


def _outputs(qmodel: PreparedModel, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with in_float(qmodel), torch.no_grad():
        return [value.to(torch.float64) for value in _tensors(qmodel(*inputs)) if value.is_floating_point()]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [t for value in result.values() for t in _tensors(value)]
    if isinstance(result, (list, tuple)):
        return [t for value in result for t in _tensors(value)]
    return []
