"""Refusing models whose values are not numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.errors import DataError, StateError


def refuse_nonfinite(parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse nan and inf in parameters and in the statistics of batch norms, and nan in other buffers.

    Other buffers may be infinite: attention masks hold -inf by design.

    Args:
        parameters: Parameters by name.
        buffers: Buffers by name.

    Raises:
        DataError: There is such a value; the tensor is named.
        StateError: A lazily built module was never run.
    """
    for name, value in parameters:
        _refuse(f"the parameter {name!r}", value, infinite=True)
    for name, value in buffers:
        _refuse(f"the buffer {name!r}", value, infinite=name.rpartition(".")[2] in ("running_mean", "running_var"))


def _refuse(name: str, value: Tensor, *, infinite: bool) -> None:
    if nn.parameter.is_lazy(value):
        raise StateError(f"{name} has no shape yet", "run the lazily built model once on a batch")
    if not value.is_floating_point():
        return
    if value.numel() == 0 or all(map(math.isfinite, torch.stack(torch.aminmax(value.detach())).tolist())):
        # nan is both extrema: this takes a tenth of the time of a look at every element
        return
    if infinite or bool(torch.isnan(value).any()):
        raise DataError(f"{name} holds nan or inf", "repair the checkpoint, or train with a lower learning rate")
