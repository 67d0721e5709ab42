"""Running the layers that read a tensor again with other values of it, beside a run of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.graph.prepared import PreparedModel

#: functions that change their first argument besides the methods and functions whose name ends in an underscore
_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "ipow", "setitem"})


@dataclass(frozen=True)
class Region:
    """What lies between one quantizer's call and the next ones.

    Attributes:
        call: The quantizer's call.
        nodes: What depends on it, up to the next quantizers, in execution order.
        ends: Those of them (or the call itself) that a next quantizer or the model's user reads.
    """

    call: fx.Node
    nodes: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]


def region_of(call: fx.Node) -> Region:
    """Return the region behind a quantizer's call."""
    inside, ends = {call}, []
    # a graph is in execution order
    node = call
    while node.op != "root":
        if node in inside:
            if any(_is_border(user) for user in node.users):
                ends.append(node)
            inside.update(user for user in node.users if not _is_border(user))
        node = node.next
    order = tuple(n for n in call.graph.nodes if n in inside and n is not call)
    return Region(call, order, tuple(ends))


def _is_border(node: fx.Node) -> bool:
    return node.op == "output" or node.meta.get("quantizes") is not None


#: called with a region, the value that its quantizer read, and a function from another value to those of the ends
Visit = Callable[[Region, Tensor, Callable[[Tensor], list[Any]], list[Any]], None]


class Replay:
    """A model's graph, executed node by node, with regions that are executed again.

    Only what is still to be read is kept. Operators that work in place get copies of what they change, so a value stays
    what it was when it was read first.

    Args:
        qmodel: The model; quantizers do what their phase says.
        regions: What is to be executed again.
    """

    def __init__(self, qmodel: PreparedModel, regions: list[Region]) -> None:
        self.qmodel = qmodel
        nodes = list(qmodel.graph.nodes)
        self._last: dict[fx.Node, fx.Node] = {argument: n for n in nodes for argument in n.all_input_nodes}
        place = {n: index for index, n in enumerate(nodes)}
        self._due: dict[fx.Node, list[Region]] = {}
        for region in regions:
            self._due.setdefault(max((region.call, *region.nodes), key=lambda n: place[n]), []).append(region)
            for end in region.ends:
                last = max(region.call, *region.nodes, end, self._last.get(end, end), key=lambda n: place[n])
                self._last[end] = last
            read = region.call.args[0]
            if isinstance(read, fx.Node):
                last = max(region.call, *region.nodes, self._last.get(read, read), key=lambda n: place[n])
                self._last[read] = last
        self._replayed = {n for region in regions for n in region.nodes}
        self._forget: dict[fx.Node, list[fx.Node]] = {}
        for argument, n in self._last.items():
            self._forget.setdefault(n, []).append(argument)

    def run(self, inputs: tuple[Tensor, ...], visit: Visit) -> None:
        """Execute the model on one batch, and call `visit` for each region as soon as all of it was executed.

        Args:
            inputs: The model's tensors.
            visit: Gets the region, what its quantizer read, a function that executes the region for another value of
                that and returns the values of its ends, and those values as they were.
        """
        values: dict[fx.Node, Any] = {}
        read: dict[fx.Node, dict[fx.Node, Any]] = {}
        given: Iterator[Tensor] = iter(inputs)
        for node in self.qmodel.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = next(given, node.args[0] if node.args else None)
            else:
                if node in self._replayed:
                    read[node] = {argument: values[argument] for argument in node.all_input_nodes}
                self._execute(node, values, values)
            for region in self._due.get(node, ()):
                self._visit(region, values, read, visit)
            for done in self._forget.get(node, ()):
                values.pop(done, None)

    def _visit(
        self, region: Region, values: Mapping[fx.Node, Any], read: Mapping[fx.Node, dict[fx.Node, Any]], visit: Visit
    ) -> None:
        def again(value: Tensor) -> list[Any]:
            fresh: dict[fx.Node, Any] = {region.call: value}
            for node in region.nodes:
                self._execute(node, {**read[node], **{n: fresh[n] for n in node.all_input_nodes if n in fresh}}, fresh)
            return [fresh[end] for end in region.ends]

        source = region.call.args[0]
        assert isinstance(source, fx.Node)
        visit(region, values[source], again, [values[end] for end in region.ends])

    def _execute(self, node: fx.Node, known: Mapping[fx.Node, Any], into: dict[fx.Node, Any]) -> None:
        """Compute a node from the values of its arguments."""
        args = fx.node.map_arg(node.args, lambda n: known[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n])
        changed = self._changed(node)
        if changed is not None and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        target: Any = node.target
        if node.op == "get_attr":
            result: Any = self.qmodel
            for part in str(target).split("."):
                result = getattr(result, part)
        elif node.op == "call_module":
            result = self.qmodel.get_submodule(str(target))(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(target))(*args[1:], **kwargs)
        else:
            result = target(*args, **kwargs)
        into[node] = result
        if changed is not None:
            # whoever reads the argument from here on reads what became of it
            into[changed] = args[0]

    def _changed(self, node: fx.Node) -> fx.Node | None:
        """Return the argument that a node changes in place."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.op == "call_module":
            module: nn.Module = self.qmodel.get_submodule(str(node.target))
            return first if getattr(module, "inplace", False) is True else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        return first if in_place or node.kwargs.get("inplace") is True else None


def is_float(value: object) -> bool:
    """Tell whether a value is a tensor of a floating-point dtype."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
