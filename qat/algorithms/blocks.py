"""Finding the blocks of a network: pieces whose layers are reconstructed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import fx

from qat.algorithms.units import Layer, Unit, layer_units, make_unit, quantized_layers, varying_nodes
from qat.errors import StateError
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import node_values

#: operators that join paths
_JOINS = frozenset({"add", "concat", "stack"})
#: more layers than that are no block: the joining path spans the network, as in a U-Net
_MOST = 8

#: `residual`: where paths part and join again; `layer`: none; or the module paths of the blocks
Blocks = Literal["residual", "layer"] | Sequence[str]


def block_units(
    qmodel: PreparedModel, blocks: Blocks = "residual", reach: Literal["activation", "quantizer"] = "quantizer"
) -> tuple[Unit, ...]:
    """Return the units to reconstruct, in execution order: blocks, and the layers that are in none.

    A block by `residual` is what lies between the value that an addition's (concatenation's) paths start from and its
    result with the clamp and the fake quantizer that follow; the innermost one where they are nested. The result of a
    block is all that is read of it from outside.

    Args:
        qmodel: The model.
        blocks: `residual`, `layer`, or module paths, each of which is one block.
        reach: Whether the fake quantizer of the result is part of it.

    Raises:
        StateError: A module path that names no block: it computes nothing, has no quantized layer, or more than its
            last value is read outside.
    """
    finder = _Finder(qmodel, reach)
    if isinstance(blocks, str):
        if blocks not in ("residual", "layer"):
            raise StateError(f"unknown blocks {blocks!r}", "choose residual, layer, or give a list of module paths")
        found = finder.joins() if blocks == "residual" else []
    else:
        found = [finder.module(path) for path in blocks]
    taken = {node for unit in found for node in unit.nodes}
    if sum(len(unit.nodes) for unit in found) > len(taken):
        raise StateError(f"the blocks {', '.join(repr(b) for b in blocks)} overlap", "give modules beside each other")
    single = [unit for unit in layer_units(qmodel, reach) if not taken.intersection(unit.nodes)]
    return tuple(sorted([*found, *single], key=lambda unit: finder.place[unit.output]))


class _Finder:
    """A prepared graph with what the search for blocks needs of it."""

    def __init__(self, qmodel: PreparedModel, reach: str) -> None:
        self.qmodel, self.reach = qmodel, reach
        self.varying = varying_nodes(qmodel.graph)
        self.nodes = [node for node in qmodel.graph.nodes if node in self.varying and node.op != "output"]
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.values = node_values(qmodel)
        nodes = {node.name: node for node in self.nodes}
        self.layers: dict[fx.Node, Layer] = {
            nodes[qmodel.opgraph.nodes[name]]: layer
            for name, layer in quantized_layers(qmodel).items()
            if qmodel.opgraph.nodes[name] in nodes
        }

    def joins(self) -> list[Unit]:
        """Return the blocks between the parting and the joining of paths."""
        parents = self._dominators()
        found: list[Unit] = []
        taken: set[fx.Node] = set()
        for node in self.nodes:
            op = self.qmodel.opgraph.ops.get(self.values.get(node, ""))
            joins = op is not None and op.kind in _JOINS and node.meta.get("quantizes") is None
            start = parents[node] if joins and len(self._read(node)) > 1 else None
            if start is None:
                continue
            unit = self._unit(self._tail(self._between(start, node)))
            if unit is None or taken.intersection(unit.nodes) or not 1 < len(unit.layers) <= _MOST:
                continue
            found.append(unit)
            taken.update(unit.nodes)
        return found

    def module(self, path: str) -> Unit:
        """Return a module as a block.

        Raises:
            StateError: It is none.
        """
        own = {n for n in self.nodes if self.values.get(n, "").split("#")[0].startswith((f"{path}.", f"{path}#"))}
        own |= {n for n in self.nodes if self.values.get(n, "").split("#")[0] == path}
        if not own:
            raise StateError(
                f"no tensor of the model is computed in a module {path!r}", "give a path as in print(plan)"
            )
        # sizes that only the block reads have no names
        for node in reversed(self.nodes):
            if node not in self.values and node.users and all(user in own for user in node.users):
                own.add(node)
        unit = self._unit(self._tail(own))
        if unit is None or not unit.layers:
            cause = "has no quantized layer" if unit is not None else "has more than one result"
            raise StateError(f"{path!r} is no block: it {cause}", "choose another module")
        return unit

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return [argument for argument in node.all_input_nodes if argument in self.varying]

    def _dominators(self) -> dict[fx.Node, fx.Node | None]:
        """Return the last node that every path from the model's inputs to a node goes through (Cooper et al., 2001)."""
        parent: dict[fx.Node, fx.Node | None] = {}
        for node in self.nodes:
            common: fx.Node | None = None
            for number, argument in enumerate(self._read(node)):
                a: fx.Node | None = argument if number == 0 else common
                b: fx.Node | None = argument
                while a is not None and b is not None and a is not b:
                    if self.place[a] > self.place[b]:
                        a = parent[a]
                    else:
                        b = parent[b]
                common = a if a is b else None
                if common is None:
                    break
            parent[node] = common
        return parent

    def _between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        found, left = {end}, [end]
        while left:
            for argument in self._read(left.pop()):
                if argument is not start and argument not in found:
                    found.add(argument)
                    left.append(argument)
        return found

    def _tail(self, own: Iterable[fx.Node]) -> set[fx.Node]:
        """Add the clamp and the fake quantizer that alone read the last node, as far as the blocks reach."""
        found = set(own)
        last = max(found, key=self.place.__getitem__)
        if self.reach == "activation" and last.meta.get("quantizes") is not None:
            found.remove(last)
            return found
        while len(last.users) == 1:
            (user,) = last.users
            op = self.qmodel.opgraph.ops.get(self.values.get(user, ""))
            quantizes = user.meta.get("quantizes") is not None
            if (quantizes and self.reach == "activation") or (not quantizes and (op is None or op.kind != "clamp")):
                break
            found.add(user)
            last = user
            if quantizes:
                break
        return found

    def _unit(self, own: set[fx.Node]) -> Unit | None:
        """Make a unit, or None where more than the last value is read outside."""
        ordered = sorted(own, key=self.place.__getitem__)
        last = ordered[-1]
        if any(user not in own for node in ordered if node is not last for user in node.users):
            return None
        layers = tuple(self.layers[node] for node in ordered if node in self.layers)
        return make_unit(self.values.get(last, last.name), ordered, layers, self.varying)
