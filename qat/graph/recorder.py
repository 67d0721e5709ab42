"""`GraphRecorder`: turns what happens to traced values into nodes of a torch.fx graph."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qat.graph import calls
from qat.graph.hints import Hints, substitute
from qat.graph.proxy import (
    TRACED_SCALARS,
    TracedSize,
    TracedTensor,
    UntraceableError,
    is_traced,
)
from qat.graph.source import calling_source


class GraphRecorder:
    """Builds the graph.

    Args:
        root: The model; parameters and buffers are found in it.
        hints: Evaluates nodes for the hinted batch sizes.
        entry: Code object at which the search for the user's source line ends.

    Attributes:
        graph: The graph so far.
        scope: Path of the module whose forward runs.
        paused: Whether torch functions and modules are run and not recorded.
        constants: Tensors that are part of no module, by the name under which the root will hold them.
        added_modules: Modules that take the place of functions, by the name under which the root will hold them.
    """

    def __init__(self, root: nn.Module, hints: Hints, entry: CodeType) -> None:
        self.root = root
        self.hints = hints
        self.graph = fx.Graph()
        self.scope = ""
        self.paused = False
        self.constants: dict[str, Tensor] = {}
        self.added_modules: dict[str, nn.Module] = {}
        self._entry = entry
        self._keys = {id(t): key for key, t in (*root.named_parameters(), *root.named_buffers())}
        self._attributes: dict[str, fx.Node] = {}
        self._constant_names: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._holders: dict[fx.Node, list[TracedTensor]] = {}
        self._retired: dict[int, Any] = {}
        self._undo: list[Callable[[], Any]] = []

    # -- nodes

    def emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record a node and return its traced value, or the plain value where no tensor and no batch is in it."""
        return self.emit_labelled(None, op, target, args, kwargs)

    def emit_labelled(
        self, label: str | None, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Record a node that is named after a label and not after its target."""
        lowered, lowered_kwargs = self.lower(args), self.lower(dict(kwargs))
        vals = self._evaluate(self._function(op, target), lowered, lowered_kwargs)
        return self.record(vals, label, op, target, lowered, lowered_kwargs)

    def record(self, vals: tuple[Any, Any], label: str | None, op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node whose hints are known and whose arguments are lowered."""
        made: list[fx.Node] = []

        def node() -> fx.Node:
            if not made:
                shape = self.hints.shape(vals)
                made.append(self.graph.create_node(op, target, args, kwargs))
                made[0].meta.update(
                    vals=vals, shape=shape, scope=self.scope, label=label, source=self.source(), name=None
                )
            return made[0]

        return self._wrap(vals, node)

    def _function(self, op: str, target: Any) -> Callable[..., Any]:
        if op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)
        function: Callable[..., Any] = self.module(target) if op == "call_module" else target
        return function

    def _evaluate(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        paused, self.paused = self.paused, True
        try:
            return self.hints.evaluate(function, args, kwargs)
        finally:
            self.paused = paused

    def _wrap(self, vals: tuple[Any, Any], node: Callable[[], fx.Node]) -> Any:
        a, b = vals
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor):
                raise UntraceableError("the type of a result depends on the batch size")
            return self.traced(node())
        if not _holds_tensor(a) and _equal(a, b):
            return a
        if type(a) is not type(b):
            raise UntraceableError("the type of a result depends on the batch size")
        if type(a) in TRACED_SCALARS:
            return TRACED_SCALARS[type(a)](self, node())
        if isinstance(a, torch.Size):
            return TracedSize(self._items(vals, node, range(len(a)), operator.getitem))
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            names = [f.name for f in dataclasses.fields(a) if f.init]
            return type(a)(**dict(zip(names, self._items(vals, node, names, getattr), strict=True)))
        if isinstance(a, Mapping):
            items = dict(zip(a, self._items(vals, node, a, operator.getitem), strict=True))
            return items if type(a) is dict else type(a)(items)  # type: ignore[call-arg]
        if isinstance(a, tuple | list):
            if len(a) != len(b):
                raise UntraceableError("the number of results depends on the batch size")
            parts = self._items(vals, node, range(len(a)), operator.getitem)
            return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
        raise UntraceableError(f"a result of type {type(a).__name__} cannot be recorded")

    def _items(
        self, vals: tuple[Any, Any], node: Callable[[], fx.Node], keys: Any, get: Callable[..., Any]
    ) -> list[Any]:
        found = []
        for key in keys:
            both = get(vals[0], key), get(vals[1], key)
            static = not _holds_tensor(both[0]) and _equal(*both)
            args = () if static else (node(), key)
            found.append(both[0] if static else self.record(both, None, "call_function", get, args, {}))
        return found

    def traced(self, node: fx.Node, *, parameter: bool = False) -> TracedTensor:
        """Make a traced tensor that stands at a node."""
        made = TracedTensor.make(self, node, node.meta["vals"][0], parameter=parameter)
        self._holders.setdefault(node, []).append(made)
        return made

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record a call of a torch function or tensor method."""
        return calls.record_call(self, func, args, kwargs)

    def size(self, tensor: Any) -> Any:
        """Sizes of a tensor: numbers, and traced ones where they depend on the batch."""
        if not isinstance(tensor, TracedTensor):
            return tensor.shape
        a, b = self.lower(tensor).meta["vals"]
        if a.shape == b.shape:
            return a.shape
        if a.dim() != b.dim():
            raise UntraceableError("the number of dimensions depends on the batch size")
        return TracedSize(
            p if p == q else self.emit("call_method", "size", (tensor, dim), {})
            for dim, (p, q) in enumerate(zip(a.shape, b.shape, strict=True))
        )

    def source(self) -> str:
        """`file:line` of the user's code that runs now; of torch's container where only that is the caller."""
        return calling_source(self._entry)

    # -- arguments

    def lower(self, value: Any) -> Any:
        """Replace traced values and tensors in arguments by nodes.

        Raises:
            UntraceableError: A value of a type that generated code cannot hold.
        """
        kind = type(value)
        if kind is TracedTensor:
            node = value.fx_node
            key = _storage(node.meta["vals"][0])
            if key is not None and key in self._retired:
                raise UntraceableError("a tensor is read after it was written in place through another view")
            return self._alive(node)
        if is_traced(value):
            return self._alive(value.fx_node)
        if isinstance(value, Tensor):
            return self._attribute(value)
        if isinstance(value, torch.Size | TracedSize):
            return tuple(self.lower(item) for item in value)
        if isinstance(value, tuple):
            items = [self.lower(item) for item in value]
            return kind(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self.lower(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.lower(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.lower(value.start), self.lower(value.stop), self.lower(value.step))
        if isinstance(value, range):
            return list(value)
        if isinstance(value, np.generic):
            return value.item()
        plain = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        if value is None or value is ... or isinstance(value, plain):
            return value
        raise UntraceableError(f"an argument of type {kind.__name__} cannot be recorded")

    def _alive(self, node: fx.Node) -> fx.Node:
        if node._erased:
            raise UntraceableError("a value from inside a submodule that stays float is used outside of it")
        return node

    def _attribute(self, tensor: Tensor) -> fx.Node:
        key = self._keys.get(id(tensor))
        if key is None:
            if (_storage(tensor) or 0) in self._retired:
                raise UntraceableError("a constant tensor is read after a computed value was written into it")
            version = (id(tensor), tensor._version)
            if version not in self._constant_names:
                name = self._free_name("_constant", len(self.constants))
                # a copy, for the user may go on writing to it; the tensor is kept so that its id stays its own
                self.constants[name] = tensor.detach().clone()
                self._constant_names[version] = (name, tensor)
            key = self._constant_names[version][0]
        return self.attribute_node(key, self.constants.get(key, tensor))

    def attribute_node(self, key: str, tensor: Tensor) -> fx.Node:
        """Return the node of a parameter, buffer or constant; there is one for each."""
        node = self._attributes.get(key)
        if node is None or node._erased:
            fake = self.hints.fake(tensor)
            node = self.graph.create_node("get_attr", key)
            node.meta.update(
                vals=(fake, fake), shape=tuple(tensor.shape), scope="", label=None, source=self.source(), name=None
            )
            self._attributes[key] = node
        return node

    def parameter(self, value: nn.Parameter) -> Any:
        """Return the traced value of a parameter of the model (or the parameter, if it is none of the model's)."""
        key = self._keys.get(id(value))
        return value if key is None else self.traced(self.attribute_node(key, value), parameter=True)

    # -- modules

    def module(self, target: str) -> nn.Module:
        """Find a module that a node calls."""
        return self.added_modules[target] if target in self.added_modules else self.root.get_submodule(target)

    def call_added_module(self, module: nn.Module, label: str, args: tuple[Any, ...], **kwargs: Any) -> Any:
        """Record the call of a module that is none of the user's tree."""
        name = self._free_name(f"_{label}", len(self.added_modules))
        module.eval()
        self.added_modules[name] = module
        return self.emit_labelled(label, "call_module", name, args, kwargs)

    def _free_name(self, stem: str, number: int) -> str:
        while hasattr(self.root, f"{stem}{number}"):
            number += 1
        return f"{stem}{number}"

    # -- writing in place

    def rebind(self, old: fx.Node, new: fx.Node) -> None:
        """Let every holder of a value, and of what it is an indexed part of, continue with what was written."""
        storage, fresh = _storage(old.meta["vals"][0]), _storage(new.meta["vals"][0])
        part_of = old.args[0] if old.target is operator.getitem else None
        if storage != fresh and isinstance(part_of, fx.Node) and _shares(part_of, storage):
            args = (part_of, old.args[1], new)
            whole = self.record(self._evaluate(calls.write, args, {}), None, "call_function", calls.write, args, {})
            self.rebind(part_of, whole.fx_node)
        for holder in self._holders.pop(old, []):
            holder.fx_node = new
            self._holders.setdefault(new, []).append(holder)
            self._undo.append(functools.partial(self._return, holder, old))
        if storage != fresh:
            self._retire(storage, old.meta["vals"][0])

    def _return(self, holder: TracedTensor, node: fx.Node) -> None:
        # by identity: comparing traced tensors would record a node
        self._holders[holder.fx_node] = [h for h in self._holders[holder.fx_node] if h is not holder]
        holder.fx_node = node
        self._holders.setdefault(node, []).append(holder)

    def retire(self, tensor: Tensor) -> None:
        """Forbid further use of a real tensor into which a traced value was written."""
        self._retire(_storage(tensor), tensor)

    def _retire(self, storage: int | None, tensor: Tensor) -> None:
        if storage is not None and storage not in self._retired:
            self._retired[storage] = tensor  # kept, so that no other storage gets its address
            self._undo.append(lambda: self._retired.pop(storage))

    # -- rolling back

    def mark(self) -> tuple[fx.Node, int]:
        """Remember the present state for `roll_back`."""
        return self.graph._root._prev, len(self._undo)

    def roll_back(self, mark: tuple[fx.Node, int]) -> None:
        """Forget everything since the mark."""
        last, undone = mark
        while len(self._undo) > undone:
            self._undo.pop()()
        while self.graph._root._prev is not last:
            self.graph.erase_node(self.graph._root._prev)

    def real_values(self, nodes: Any, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        """Compute the values of nodes on real inputs.

        Args:
            nodes: The wanted nodes.
            inputs: Input tensors by the name of the argument.
        """
        needed: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo.extend(node.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                values[node] = inputs[node.target]
            elif node.op == "get_attr":
                values[node] = self._real_attribute(node.target)
            else:
                args, kwargs = substitute((node.args, node.kwargs), values.__getitem__)
                values[node] = self._function(node.op, node.target)(*args, **kwargs)
        return values

    def _real_attribute(self, key: str) -> Tensor:
        if key in self.constants:
            return self.constants[key]
        owner, _, name = key.rpartition(".")
        found: Tensor = getattr(self.root.get_submodule(owner), name)
        return found


def _shares(node: fx.Node, storage: int | None) -> bool:
    value = node.meta["vals"][0]
    return isinstance(value, Tensor) and _storage(value) == storage


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None  # sparse and the like share nothing


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, tuple | list):
        return any(_holds_tensor(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_tensor(getattr(value, f.name)) for f in dataclasses.fields(value))
    return False


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 - nan
    except Exception:  # noqa: BLE001 - whatever a user's type does
        return False
