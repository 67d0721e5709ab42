"""Parts of a tensor: indexing, splitting, narrowing, rolling, flipping."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.graph.calls import write
from qat.graph.recognize.base import Site, describe, first_value, reshape_to
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer, Step


def slice_step(axis: int, start: int, end: int, step: int = 1) -> Step:
    """The step that takes `start` to `end` (exclusive) along one axis."""
    return "slice", {"axes": (axis,), "starts": (start,), "ends": (end,), "steps": (step,)}


# --- indexing


def _getitem(site: Site, x: Any, index: Any) -> Operator:
    if not isinstance(x, fx.Node):
        raise NotCanonical(f"the operand {x!r} is no tensor")
    if x.op == "get_attr" or isinstance(first_value(x), Tensor):
        return _index(site, x, index)
    source = site.operators.get(x)
    if source is not None and source.kind == "split":
        return _piece(site, source, index)
    return _item(site, x, index)


def _item(site: Site, x: Any, name: Any) -> Operator:
    """An item of a structure of tensors that a call without a kind returned; or an attribute of a tensor."""
    if not isinstance(x, fx.Node) or isinstance(first_value(x), Tensor):
        raise NotCanonical(f"no integer kind for Tensor.{name}")
    source = site.operators.get(x)
    raise NotCanonical(str(source.attrs["cause"]) if source else f"no integer kind for {describe(x)}")


def _write(site: Site, *args: Any) -> Operator:
    raise NotCanonical("it writes into a part of a tensor; build the tensor with torch.cat or torch.where")


def _index(site: Site, x: fx.Node, index: Any) -> Operator:
    """Basic indexing as one slice and, where axes appear or vanish, one reshape."""
    shape = site.shape_of(x)
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if isinstance(index, list) or any(
        isinstance(e, (list, Tensor)) or (isinstance(e, fx.Node) and isinstance(first_value(e), Tensor))
        for e in entries
    ):
        raise NotCanonical("it gathers by a tensor of indices")
    entries = list(site.static(tuple(_open_ends(x, entries, len(shape)))))
    if any(isinstance(e, bool) for e in entries):
        raise NotCanonical("it gathers by a boolean")
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = len(shape) - sum(e is not None and e is not Ellipsis for e in entries)
        entries[at : at + 1] = [slice(None)] * missing
    bounds: list[tuple[int, int, int, int]] = []
    reshaped = False
    axis = 0
    for entry in entries:
        if entry is None:
            reshaped = True
            continue
        if isinstance(entry, int):
            size = site.length(x, axis, "indexing")
            first = entry + size if entry < 0 else entry
            bounds.append((axis, first, first + 1, 1))
            reshaped = True
        elif entry != slice(None):
            size = site.length(x, axis, "slicing")
            start, stop, step = entry.indices(size)
            if (start, stop, step) != (0, size, 1):
                bounds.append((axis, start, max(start, stop), step))
        axis += 1
    steps: list[Step] = []
    if bounds:
        axes, starts, ends, strides = zip(*bounds, strict=True)
        steps.append(("slice", {"axes": axes, "starts": starts, "ends": ends, "steps": strides}))
    if reshaped:
        steps.append(reshape_to(site.shape))
    return site.steps(x, *steps)


def _open_ends(x: fx.Node, entries: list[Any], rank: int) -> list[Any]:
    """Replace slices that span the whole (perhaps batch-dependent) axis by `:`.

    `x[:n]` with `n` the batch size is the common case: its bound is no number, but it takes all there is.
    """
    found = []
    named = sum(e is not None and e is not Ellipsis for e in entries)
    axis = 0
    for entry in entries:
        if entry is Ellipsis:
            axis += rank - named
        elif isinstance(entry, slice) and _is_whole(x, entry, axis):
            found.append(slice(None))
            axis += 1
            continue
        elif entry is not None:
            axis += 1
        found.append(entry)
    return found


def _is_whole(x: fx.Node, entry: slice, axis: int) -> bool:
    if entry.step not in (None, 1) or entry.start not in (None, 0):
        return False
    if entry.stop is None:
        return True
    values = x.meta["vals"]
    ends = entry.stop.meta["vals"] if isinstance(entry.stop, fx.Node) else (entry.stop, entry.stop)
    return all(isinstance(end, int) and end >= value.shape[axis] for end, value in zip(ends, values, strict=True))


def _narrow(site: Site, x: Any, dim: Any, start: Any, length: Any) -> Operator:
    axis = site.axis(dim, x)
    size = site.length(x, axis, "slicing")
    first, count = site.ints(start, 1)[0], site.ints(length, 1)[0]
    first = first + size if first < 0 else first
    return site.steps(x, slice_step(axis, first, first + count))


def _select(site: Site, x: Any, dim: Any, index: Any) -> Operator:
    axis = site.axis(dim, x)
    size = site.length(x, axis, "indexing")
    at = site.ints(index, 1)[0]
    at = at + size if at < 0 else at
    return site.steps(x, slice_step(axis, at, at + 1), reshape_to(site.shape))


# --- splitting: the tuple is a `split`, each item taken from it a `slice` of the tensor that was split


def _pieces(site: Site, x: Any, dim: Any, keeps_axis: bool) -> Operator:
    if not keeps_axis and len(site.shape_of(x)) < 2:
        raise NotCanonical("it takes single numbers out of a vector")
    axis = site.axis(dim, x)
    site.length(x, axis, "splitting")
    parts = first_value(site.node)
    sections = tuple(int(p.shape[axis]) for p in parts) if keeps_axis else (1,) * len(parts)
    starts = tuple(sum(sections[:i]) for i in range(len(sections)))
    return site.unary("split", x, axis=axis, sections=sections, starts=starts, keeps_axis=keeps_axis)


def _split(site: Site, x: Any, split_size_or_sections: Any = None, dim: Any = 0, *, split_size: Any = None) -> Operator:
    return _pieces(site, x, dim, keeps_axis=True)


def _chunk(site: Site, x: Any, chunks: Any, dim: Any = 0) -> Operator:
    return _pieces(site, x, dim, keeps_axis=True)


def _tensor_split(
    site: Site,
    x: Any,
    indices_or_sections: Any = None,
    dim: Any = 0,
    *,
    indices: Any = None,
    sections: Any = None,
    tensor_indices_or_sections: Any = None,
) -> Operator:
    return _pieces(site, x, dim, keeps_axis=True)


def _unbind(site: Site, x: Any, dim: Any = 0) -> Operator:
    return _pieces(site, x, dim, keeps_axis=False)


def _piece(site: Site, source: Operator, index: Any) -> Operator:
    axis, sections, starts = (source.attrs[name] for name in ("axis", "sections", "starts"))
    steps = [slice_step(axis, starts[index], starts[index] + sections[index])]
    if not source.attrs["keeps_axis"]:
        steps.append(reshape_to(site.shape))
    return site.steps(source.inputs[0], *steps)


# --- rolling and flipping


def _roll(site: Site, x: Any, shifts: Any, dims: Any = None) -> Operator:
    if dims is None or dims == ():
        raise NotCanonical("a roll over the flattened tensor")
    axes = site.axes(dims, x)
    total: dict[int, int] = {}
    for axis, shift in zip(axes, site.ints(shifts, len(axes)), strict=True):
        total[axis] = total.get(axis, 0) + shift
    moved = {a: s % site.length(x, a, "a roll") for a, s in total.items()}
    moved = {a: s for a, s in moved.items() if s}
    if not moved:
        return site.unary("identity", x)
    return site.steps(x, ("roll", {"shifts": tuple(moved.values()), "axes": tuple(moved)}))


def _flip_axes(site: Site, x: Any, axes: tuple[int, ...]) -> Operator:
    """A slice with step -1; the end -size-1 lies before the first element, as in ONNX."""
    sizes = [site.length(x, axis, "a flip") for axis in axes]
    if not axes:
        return site.unary("identity", x)
    return site.unary(
        "slice",
        x,
        axes=axes,
        starts=tuple(size - 1 for size in sizes),
        ends=tuple(-size - 1 for size in sizes),
        steps=(-1,) * len(axes),
    )


def _flip(site: Site, x: Any, *dims: Any) -> Operator:
    listed = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return _flip_axes(site, x, site.axes(listed, x))


def _flip_dims(site: Site, x: Any, dims: Any) -> Operator:
    return _flip(site, x, dims)


def _fliplr(site: Site, x: Any) -> Operator:
    return _flip_axes(site, x, (1,))


def _flipud(site: Site, x: Any) -> Operator:
    return _flip_axes(site, x, (0,))


MODULES: Mapping[type[nn.Module], Recognizer] = {}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    operator.getitem: _getitem,
    builtins.getattr: _item,
    write: _write,
    torch.narrow: _narrow,
    torch.select: _select,
    torch.split: _split,
    torch.functional.split: _split,
    torch.chunk: _chunk,
    torch.tensor_split: _tensor_split,
    torch.unbind: _unbind,
    torch.roll: _roll,
    torch.flip: _flip_dims,
    torch.fliplr: _fliplr,
    torch.flipud: _flipud,
}
METHODS: Mapping[str, Recognizer] = {
    "narrow": _narrow,
    "select": _select,
    "split": _split,
    "chunk": _chunk,
    "tensor_split": _tensor_split,
    "unbind": _unbind,
    "roll": _roll,
    "flip": _flip,
    "fliplr": _fliplr,
    "flipud": _flipud,
}
