"""Operators that are executed as one."""

from __future__ import annotations

from dataclasses import dataclass

from qat.graph.operators import ParamRef
from qat.graph.opgraph import GraphOp, OpGraph

#: operators whose result may be clamped before it is quantized, at no cost
_CLAMPED = frozenset(
    {"conv", "conv_transpose", "linear", "matmul", "batch_norm", "add", "sub", "mul", "div", "mean", "avg_pool"}
)


@dataclass(frozen=True)
class Fusion:
    """Operators that are executed as one: `ops[0]` computes, a batch norm and a clamp may follow."""

    ops: tuple[GraphOp, ...]

    @property
    def batch_norm(self) -> GraphOp | None:
        """The batch norm that is folded into the weights."""
        return next((op for op in self.ops[1:] if op.kind == "batch_norm"), None)

    @property
    def clamp(self) -> GraphOp | None:
        """The clamp that ends the fusion."""
        return self.ops[-1] if len(self.ops) > 1 and self.ops[-1].kind == "clamp" else None


def find_fusions(graph: OpGraph) -> dict[str, Fusion]:
    """Find `conv|linear [+ batch norm] [+ clamp]` and `operator + clamp`, by the name of the last tensor.

    Every operator belongs to exactly one fusion. A batch norm is folded only if it alone reads the result of the
    operator before it, and if every use of that operator's weight is followed by the same batch norm.
    """
    users = graph.users()
    only_user = {name: ops[0] for name, ops in users.items() if len(ops) == 1 and name not in graph.outputs}
    norm_of_weight: dict[str, set[str]] = {}
    for op in graph.ops.values():
        if op.weight:
            after = only_user.get(op.name)
            norm_of_weight.setdefault(op.weight.key, set()).add(_norm_key(after) if after else "")
    taken: set[str] = set()
    fusions: dict[str, Fusion] = {}
    for op in graph.ops.values():
        if op.name in taken:
            continue
        chain = [op]
        after = only_user.get(op.name)
        if op.weight and after is not None and after.kind == "batch_norm" and _foldable(op):
            key = _norm_key(after)
            # one scaling a weight, and a module to take it from
            if key and norm_of_weight[op.weight.key] == {key}:
                chain.append(after)
                after = only_user.get(after.name)
        if op.kind in _CLAMPED and after is not None and after.kind == "clamp":
            chain.append(after)
        taken.update(o.name for o in chain)
        fusions[chain[-1].name] = Fusion(tuple(chain))
    return fusions


def _norm_key(op: GraphOp) -> str:
    """What tells one batch norm module from another: the place of its running mean."""
    mean = op.inputs[3] if op.kind == "batch_norm" else None
    return f"{mean.module}.{mean.attribute}" if isinstance(mean, ParamRef) else ""


def _foldable(op: GraphOp) -> bool:
    if op.kind == "linear":
        # on more dimensions the batch norm's channels are dimension 1, and not the features
        return op.shape is not None and len(op.shape) == 2
    return op.kind != "conv_transpose" or op.attrs.get("groups", 1) == 1
