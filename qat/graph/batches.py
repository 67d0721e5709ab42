"""Feeding batches of any common form to a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat.errors import DataError
from qat.graph.prepared import PreparedModel


def model_inputs(qmodel: PreparedModel, batch: Any) -> tuple[Tensor, ...]:
    """Take a model's tensor inputs out of a batch.

    Args:
        qmodel: The model.
        batch: A tensor; a sequence whose first elements are the inputs (what follows, such as labels, is left out); or
            a mapping by input name.

    Returns:
        The inputs in the model's order, on the device of its parameters.

    Raises:
        DataError: An input is missing, or has another shape or dtype than the example; it is named.
    """
    names = qmodel.opgraph.inputs
    if isinstance(batch, Tensor):
        given: tuple[Any, ...] = (batch,)
    elif isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise DataError(f"a batch lacks the input {missing[0]!r}", f"give {', '.join(names)}")
        given = tuple(batch[name] for name in names)
    elif isinstance(batch, (list, tuple)):
        given = tuple(batch[: len(names)])
    else:
        raise DataError(f"a batch is a {type(batch).__name__}", "give tensors, sequences or mappings of tensors")
    if len(given) < len(names):
        raise DataError(
            f"a batch has {len(given)} tensors and the model takes {len(names)}", f"give {', '.join(names)}"
        )
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    return tuple(_checked(qmodel, name, value).to(device) for name, value in zip(names, given, strict=True))


def _checked(qmodel: PreparedModel, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"the input {name!r} of a batch is a {type(value).__name__}", "give a tensor")
    shape, dtype = qmodel.opgraph.shapes[name], qmodel.input_dtypes[name]
    if value.is_floating_point() != dtype.is_floating_point:
        raise DataError(f"the input {name!r} of a batch has dtype {value.dtype}", f"convert it to {dtype}")
    fits = value.dim() == len(shape) and all(w < 0 or w == h for w, h in zip(shape, value.shape, strict=False))
    if not fits:
        want = " x ".join("batch" if s < 0 else str(s) for s in shape)
        raise DataError(f"the input {name!r} of a batch has shape {tuple(value.shape)}", f"give {want}")
    return value
