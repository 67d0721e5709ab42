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
        batch: A tensor; a sequence whose first elements are the inputs (what follows, such as labels, is left out), or
            whose first element is a sequence or mapping of them; or a mapping by input name.

    Returns:
        The inputs in the model's order, on the device of its parameters. Floating-point ones have the model's dtype.

    Raises:
        DataError: An input is missing, is no tensor, has another shape than the example, or is integer where that was
            floating point or the reverse; it is named.
    """
    names = qmodel.opgraph.inputs
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (list, tuple, Mapping)):
        batch = batch[0]
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
    inputs = tuple(_checked(qmodel, name, value) for name, value in zip(names, given, strict=True))
    sizes = {name: size for name, size in zip(names, _batch_sizes(qmodel, inputs), strict=True) if size is not None}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise DataError(f"the inputs of a batch have different numbers of samples ({counts})", "give as many of each")
    return inputs


def sample_count(qmodel: PreparedModel, inputs: tuple[Tensor, ...]) -> int:
    """Return the number of samples in a model's inputs; 1 where no input has a batch dimension."""
    fixed = qmodel.plan.batch_size
    found = next((size for size in _batch_sizes(qmodel, inputs) if size is not None), None)
    return found if found is not None else fixed if fixed is not None else 1


def first_samples(qmodel: PreparedModel, inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Return the inputs of the first `count` samples; all of them where the model's batch size is fixed."""
    shapes = [qmodel.opgraph.shapes[name] for name in qmodel.opgraph.inputs]
    return tuple(
        x[: count * -shape[0]] if shape and shape[0] < 0 else x for x, shape in zip(inputs, shapes, strict=True)
    )


def join_samples(qmodel: PreparedModel, batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return several batches as one; an input without a batch dimension is that of the first batch."""
    if not batches:
        return ()
    shapes = [qmodel.opgraph.shapes[name] for name in qmodel.opgraph.inputs]
    fixed = qmodel.plan.batch_size is not None
    return tuple(
        torch.cat([batch[i] for batch in batches]) if shape and (shape[0] < 0 or fixed) else batches[0][i]
        for i, shape in enumerate(shapes)
    )


def _batch_sizes(qmodel: PreparedModel, inputs: tuple[Tensor, ...]) -> list[int | None]:
    """Return the number of samples that each input holds, None for one without a batch dimension."""
    shapes = [qmodel.opgraph.shapes[name] for name in qmodel.opgraph.inputs]
    return [
        x.shape[0] // -shape[0] if shape and shape[0] < 0 else None for x, shape in zip(inputs, shapes, strict=True)
    ]


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
    reference = next((p for p in qmodel.parameters() if p.is_floating_point()), None)
    if reference is None:
        return value.to(dtype)
    # a model that was cast to half precision after it was prepared takes half precision
    return value.to(reference.device, reference.dtype if dtype == torch.float32 else dtype)
