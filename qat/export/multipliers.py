"""Requantization multipliers that the target cannot apply."""

from __future__ import annotations

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.graph.plan import Plan
from qat.integer.program import Program

_PRODUCTS = frozenset({"conv", "conv_transpose", "linear", "matmul", "mul"})


def refuse_multipliers(program: Program, plan: Plan) -> None:
    """Refuse a network with a multiplier `s_a * s_b / s_y` that is not below the bound of its target.

    Raises:
        ExportError: There is one; layer and numbers are named.
    """
    bounds = plan.constraints.multiplier_below
    for op in program.ops:
        bound = bounds.get(op.kind)
        if bound is None or op.kind not in _PRODUCTS:
            continue
        x, w, y = (_encoding(program, name) for name in (*op.inputs[:2], op.outputs[0]))
        if x is None or w is None or y is None:
            continue
        largest = max(x.scale) * max(w.scale) / min(y.scale)
        if not largest < bound:
            raise ExportError(
                f"{op.name!r} requantizes by {largest:.6g}, and {plan.target} has only multipliers below {bound:g}",
                "widen the range of its result (another observer), or leave the layer float",
            )


def _encoding(program: Program, name: str) -> Encoding | None:
    constant = program.constants.get(name)
    return constant.encoding if constant is not None else program.tensors[name].encoding
