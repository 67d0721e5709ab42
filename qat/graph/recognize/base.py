"""The `Site`: what a recognizer can ask about the call in front of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qat.graph.recognize.types import NotCanonical, Operator, ParamRef, ScalarConst, Step


@dataclass(frozen=True)
class Site:
    """One call in the traced graph.

    Attributes:
        node: The call.
        root: The traced model.
        keys: `state_dict` key by `id` of every parameter and buffer of `root`.
        operators: The operators of the nodes before this one.
        static_batch: Batch size where the trace could not leave it open, else 1.
    """

    node: fx.Node
    root: nn.Module
    keys: Mapping[int, str]
    operators: Mapping[fx.Node, Operator]
    static_batch: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the call's result; a size -k is k times the batch size."""
        return self.shape_of(self.node)

    def shape_of(self, value: Any) -> tuple[int, ...]:
        """Shape of a node or parameter; a size -k is k times the batch size."""
        if isinstance(value, ParamRef):
            return tuple(self.value_of(value).shape)
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return tuple(get_attribute(self.root, str(value.target)).shape)
            shape = value.meta.get("shape")
            if shape is not None:
                return tuple(shape)
        raise NotCanonical(f"the operand {value!r} is no tensor")

    def value_of(self, reference: ParamRef) -> Tensor:
        """The tensor that `reference` stands for."""
        value = get_attribute(self.root, ".".join(filter(None, (reference.module, reference.attribute))))
        assert isinstance(value, Tensor)
        return value

    def tensor(self, value: Any) -> fx.Node | ParamRef:
        """`value` as a tensor operand.

        Raises:
            NotCanonical: It is no tensor.
        """
        if isinstance(value, ParamRef):
            return value
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                # a value of the graph has the name of this place, also where another place shares the tensor
                reference = self.parameter(value, "operand")
                return replace(reference, key=value.meta.get("name") or str(value.target))
            if isinstance(first_value(value), Tensor):
                return value
        raise NotCanonical(f"the operand {value!r} is no tensor")

    def operand(self, value: Any) -> fx.Node | ParamRef | ScalarConst:
        """`value` as a tensor operand or a number."""
        if isinstance(value, fx.Node) and (value.op == "get_attr" or isinstance(first_value(value), Tensor)):
            return self.tensor(value)
        return ScalarConst(self.number(value))

    def parameter(self, value: Any, role: str) -> ParamRef:
        """`value` as a parameter or buffer of the model.

        Raises:
            NotCanonical: It is computed in the forward pass.
        """
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            raise NotCanonical(f"its {role} is computed in the forward pass and no parameter of the model")
        module, _, attribute = str(value.target).rpartition(".")
        return self.reference(module, attribute)

    def optional_parameter(self, value: Any, role: str) -> ParamRef | None:
        """`parameter`, or None where `value` is None."""
        return None if value is None else self.parameter(value, role)

    def own(self, attribute: str) -> ParamRef | None:
        """The parameter or buffer of the called module, or None where the module has none under this name."""
        path = str(self.node.target)
        value = getattr(get_attribute(self.root, path), attribute, None)
        return self.reference(path, attribute) if isinstance(value, Tensor) else None

    def own_required(self, attribute: str) -> ParamRef:
        """`own` of a parameter without which the module cannot run."""
        reference = self.own(attribute)
        if reference is None:
            raise NotCanonical(f"its {attribute} is missing")
        return reference

    def reference(self, module: str, attribute: str) -> ParamRef:
        """The reference to a parameter or buffer by place."""
        path = ".".join(filter(None, (module, attribute)))
        value = get_attribute(self.root, path)
        if not isinstance(value, Tensor):
            raise NotCanonical(f"{path} is a {type(value).__name__} and no tensor")
        return ParamRef(self.keys.get(id(value), path), module, attribute)

    def static(self, value: Any) -> Any:
        """`value` with every size in it as a plain number.

        Raises:
            NotCanonical: A size depends on the batch.
        """

        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            first, second = leaf.meta["vals"]
            if isinstance(first, Tensor):
                raise NotCanonical("an argument that must be a number is a tensor")
            if first != second:
                raise NotCanonical("an argument depends on the batch size")
            return first

        return fx.node.map_aggregate(value, resolve)

    def number(self, value: Any) -> float:
        """`value` as a number.

        Raises:
            NotCanonical: It is none, or not finite.
        """
        number = self.static(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise NotCanonical(f"the operand {value!r} is neither a tensor nor a real number")
        if not math.isfinite(number):
            raise NotCanonical(f"the operand {number} is not finite")
        return float(number)

    def ints(self, value: Any, count: int) -> tuple[int, ...]:
        """`value`, one integer or a sequence of `count`, as a tuple of `count` integers."""
        found = self.static(value)
        if isinstance(found, int):
            return (found,) * count
        found = tuple(int(v) for v in found)
        if len(found) == 1:
            return found * count
        if len(found) != count:
            raise NotCanonical(f"{found} where {count} integers are expected")
        return found

    def axis(self, dim: Any, x: Any) -> int:
        """`dim` as an axis of `x`, counted from the front."""
        return self.axes(dim, x)[0]

    def axes(self, dims: Any, x: Any) -> tuple[int, ...]:
        """`dims`, one integer or several, as axes of `x`, counted from the front."""
        rank = len(self.shape_of(x))
        found = self.static(dims)
        found = (found,) if isinstance(found, int) else tuple(found)
        return tuple(d + rank if d < 0 else d for d in found)

    def length(self, x: Any, axis: int, what: str) -> int:
        """Size of `x` along `axis`.

        Raises:
            NotCanonical: It depends on the batch; the message says that `what` acts along it.
        """
        size = self.shape_of(x)[axis]
        if size < 0:
            raise NotCanonical(f"{what} along the batch")
        return size

    def spatial(self, x: Any, rank: int) -> tuple[int, ...]:
        """Spatial sizes of an N x C x spatial tensor.

        Raises:
            NotCanonical: `x` has no batch axis, or a spatial size depends on the batch.
        """
        shape = self.shape_of(x)
        if len(shape) != rank + 2:
            raise NotCanonical(f"an input of {len(shape)} dimensions where {rank + 2} (with the batch) are expected")
        if min(shape[2:]) < 0:
            raise NotCanonical("a spatial size depends on the batch size")
        return shape[2:]

    def macs(self, shape: tuple[int, ...], terms: int) -> int:
        """Multiply-accumulates for one sample, where each element of `shape` takes part in `terms` of them."""
        return math.prod(abs(size) for size in shape) * terms // self.static_batch

    def same_dtype(self, dtype: torch.dtype | None) -> None:
        """Refuse a `dtype` that differs from that of the first tensor."""
        before = next((v.dtype for n in self.node.all_input_nodes if isinstance(v := first_value(n), Tensor)), None)
        if dtype is not None and dtype != before:
            raise NotCanonical(f"it converts from {before} to {dtype}")

    def unary(self, kind: str, x: Any, **attrs: Any) -> Operator:
        """An operator with one tensor operand."""
        return Operator(kind, (self.tensor(x),), attrs)

    def steps(self, x: Any, *steps: Step) -> Operator:
        """The operator that applies `steps` one after the other: `identity`, the single step, or a `chain`.

        A roll has no kind of its own and is always a step of a chain.
        """
        if not steps:
            return self.unary("identity", x)
        if len(steps) == 1 and steps[0][0] != "roll":
            return self.unary(steps[0][0], x, **steps[0][1])
        return self.unary("chain", x, steps=steps)


def get_attribute(root: nn.Module, path: str) -> Any:
    """Value of the dotted attribute `path` of `root`."""
    value: Any = root
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    return value


def first_value(node: fx.Node) -> Any:
    """What the node gave at the first of the two traced batch sizes."""
    return node.meta["vals"][0]


def holds_tensors(node: fx.Node) -> bool:
    """Whether the node's value is a tensor or contains one."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(first_value(node)))


def reshape_to(shape: tuple[int, ...]) -> Step:
    """The step that gives `shape`, with the batch-dependent size as -1.

    Raises:
        NotCanonical: More than one size depends on the batch.
    """
    if sum(size < 0 for size in shape) > 1:
        raise NotCanonical("a reshape with more than one size that depends on the batch")
    return "reshape", {"shape": tuple(-1 if size < 0 else size for size in shape)}


def symmetric(padding: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Equal padding at both ends, per spatial dimension."""
    return tuple((p, p) for p in padding)


def describe(node: fx.Node) -> str:
    """What a node calls, as the user would write it: `torch.cumsum`, `F.linear`, `Tensor.sort`."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_module":
        return f"module {node.target}"
    name = getattr(node.target, "__name__", str(node.target))
    # functions of torch's C++ part do not say where they live
    for prefix, namespace in (("torch", torch), ("F", F)):
        if getattr(namespace, name, None) is node.target:
            return f"{prefix}.{name}"
    module = str(getattr(node.target, "__module__", "")).replace("torch._C._nn", "F").lstrip("_")
    return f"{module}.{name}"
