"""Executing a graph's operators on fake tensors, for hinted batch sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from qat.graph.proxy import BatchShapeError, UntraceableError

#: batch sizes of the hints; neither is 1, which broadcasts, and one is odd
HINTED_BATCHES = (2, 3)


class Hints:
    """Fake values of every node for two batch sizes (or twice the same one).

    Args:
        batches: The batch sizes.
    """

    def __init__(self, batches: tuple[int, int]) -> None:
        self.batches = batches
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compute with fake tensors and without gradients."""
        with self.mode, torch.no_grad():
            yield

    def fake(self, value: Any) -> Any:
        """Turn the real tensors in a nested value into fake ones."""
        return map_tensors(value, lambda t: self.mode.from_tensor(t.detach()))

    def evaluate(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Call a function whose arguments hold nodes on the hints of those nodes."""
        found = []
        for i in range(1 if self.batches[0] == self.batches[1] else 2):
            hinted_args, hinted_kwargs = substitute((args, kwargs), functools.partial(_hint, i))
            with self.running():
                found.append(function(*hinted_args, **hinted_kwargs))
        return found[0], found[-1]

    def shape(self, vals: tuple[Any, Any]) -> tuple[int, ...] | None:
        """Sizes of a tensor where -k is k times the batch size; None for what is no tensor.

        Raises:
            BatchShapeError: A size depends on the batch but is no multiple of it.
        """
        a, b = vals
        if not isinstance(a, Tensor):
            return None
        if a.dim() != b.dim():
            raise BatchShapeError("the number of dimensions depends on the batch size")
        return tuple(self._size(p, q) for p, q in zip(a.shape, b.shape, strict=True))

    def _size(self, a: int, b: int) -> int:
        first, second = self.batches
        if a == b:
            return a
        if a % first or a // first * second != b:
            raise BatchShapeError(
                f"a size is {a} for batch {first} and {b} for batch {second}: no multiple of the batch"
            )
        return -(a // first)


def _hint(which: int, node: fx.Node) -> Any:
    return node.meta["vals"][which]


def substitute(value: Any, of_node: Callable[[fx.Node], Any]) -> Any:
    """Replace the nodes in nested arguments, with containers that may be written to."""
    if isinstance(value, fx.Node):
        return of_node(value)
    if isinstance(value, tuple):
        items = [substitute(item, of_node) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [substitute(item, of_node) for item in value]
    if isinstance(value, dict):
        return {key: substitute(item, of_node) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(item, of_node) for item in (value.start, value.stop, value.step)))
    return value


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the tensors in a nested value, keeping the types of its containers."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value) if f.init}
        return type(value)(**fields)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [map_tensors(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    return value


def with_batch(tensor: Tensor, batch: int, example_batch: int | None) -> Tensor:
    """Repeat or cut the samples of an example input to a batch size.

    Args:
        tensor: Example input; it is batched if its first dimension is `example_batch`.
        batch: Wanted number of samples.
        example_batch: Number of samples of the example; None if nothing is batched.
    """
    tensor = tensor.detach()
    if example_batch is None or tensor.dim() == 0 or tensor.shape[0] != example_batch or example_batch == batch:
        return tensor
    order = torch.arange(batch, device=tensor.device) % example_batch
    return tensor.index_select(0, order)


def cause_of(error: BaseException) -> str:
    """One line that says why a computation could not be traced."""
    if isinstance(error, DataDependentOutputException):
        return "control flow or a Python value depends on the values of a tensor"
    if isinstance(error, DynamicOutputShapeException):
        return "a shape depends on the values of a tensor"
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    return message if isinstance(error, UntraceableError) else f"{type(error).__name__}: {message}"
