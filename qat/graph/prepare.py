"""`plan` and `prepare`: from a float model to a plan, and to a model with fake quantization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from qat.errors import DataError, PlanError
from qat.graph.operators import ParamRef, recognize
from qat.graph.opgraph import TUPLE_KINDS, GraphOp, OpGraph, build_opgraph
from qat.graph.plan import Plan, PlanEntry
from qat.graph.planner import find_fusions, plan_graph
from qat.graph.prepared import QUANTIZERS, PreparedModel, quantizer_key
from qat.graph.trace import Traced, trace
from qat.quantizers import FakeQuantize, WeightFakeQuantize
from qat.schemes import Schemes, make_schemes
from qat.targets import Target


@dataclass(frozen=True)
class _Analysis:
    traced: Traced
    opgraph: OpGraph
    plan: Plan
    tuples: frozenset[str]


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Target,
    scheme: Schemes | Mapping[str, Any] | None = None,
) -> Plan:
    """Say what of a model becomes integer on a target, what stays float, and why; nothing is changed.

    Args:
        model: The float model.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; the first dimension of each
            tensor is the batch.
        target: What the device can do.
        scheme: Schemes, or a mapping as in a recipe (`activations`, `weights`, `layers`); None for the target's
            defaults.

    Raises:
        TraceError: The model cannot be traced at all.
        PlanError: Nothing in it can be quantized.
        SchemeError: `scheme` has an unknown key or an impossible value.
        DataError: A weight holds nan or inf.
    """
    return _analyse(copy.deepcopy(model), example_inputs, target, scheme).plan


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Target,
    scheme: Schemes | Mapping[str, Any] | None = None,
) -> PreparedModel:
    """Return a trainable copy of a model with fake quantization at the planned places.

    Weights are fake-quantized by parametrization, with the scaling of a following batch norm; every planned activation
    gets one fake-quantizer. All parameters and buffers exist with their final shapes. The phase is `float` until
    `calibrate`.

    Args and Raises: as `plan`.
    """
    root = copy.deepcopy(model)
    found = _analyse(root, example_inputs, target, scheme)
    _parametrize_weights(root, found)
    dtypes = _input_dtypes(found)
    quantizers = _insert_quantizers(found)
    for node in found.traced.graph.nodes:
        # fake values can be neither pickled nor kept cheaply
        vals = node.meta.pop("vals", None)
        if vals is not None and isinstance(vals[0], torch.Tensor):
            node.meta["dtype"] = vals[0].dtype
    traced = found.traced
    return PreparedModel(root, traced.graph, found.opgraph, found.plan, quantizers, dtypes, traced.structure)


def _input_dtypes(found: _Analysis) -> dict[str, torch.dtype]:
    return {
        node.meta["name"]: node.meta["vals"][0].dtype
        for node in found.traced.graph.nodes
        if node.op == "placeholder" and node.meta.get("shape") is not None
    }


def _analyse(
    root: nn.Module, example_inputs: Any, target: Target, scheme: Schemes | Mapping[str, Any] | None
) -> _Analysis:
    _check_finite(root)
    schemes = make_schemes(scheme, target.activations, target.weights)
    traced = trace(root, example_inputs)
    operators = recognize(traced)
    opgraph = build_opgraph(traced.graph, operators)
    made = plan_graph(opgraph, target, schemes)
    tuples = frozenset(node.name for node, op in operators.items() if op.kind in TUPLE_KINDS)
    return _Analysis(traced, opgraph, made, tuples)


def _check_finite(root: nn.Module) -> None:
    for kind, named in (("parameter", root.named_parameters()), ("buffer", root.named_buffers())):
        for name, value in named:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DataError(f"the {kind} {name!r} holds nan or inf", "repair the checkpoint")


# -- weights


def _parametrize_weights(root: nn.Module, found: _Analysis) -> None:
    for fusion in find_fusions(found.opgraph).values():
        op = fusion.ops[0]
        if op.weight is None or found.plan[op.weight.key].decision != "integer":
            continue
        entry = found.plan[op.weight.key]
        owner = root.get_submodule(op.weight.module)
        if parametrize.is_parametrized(owner, op.weight.attribute):
            if isinstance(owner.parametrizations[op.weight.attribute][0], WeightFakeQuantize):  # type: ignore[index]
                continue
            raise PlanError(
                f"{op.weight.key} is parametrized already", "remove the parametrization, or leave the layer float"
            )
        norm = fusion.batch_norm
        weight = getattr(owner, op.weight.attribute)
        assert entry.scheme is not None
        quantizer = WeightFakeQuantize(
            entry.scheme,
            op.weight.key,
            tuple(weight.shape),
            norm_module(root, norm),
            channel_axis=1 if op.kind == "conv_transpose" else 0,
            groups=op.attrs["groups"] if op.kind == "conv_transpose" else 1,
        ).to(weight.device)
        parametrize.register_parametrization(owner, op.weight.attribute, quantizer)


def norm_module(root: nn.Module, norm: GraphOp | None) -> nn.Module | None:
    """The module of a batch norm, found through its running mean."""
    if norm is None:
        return None
    mean = norm.inputs[3]
    assert isinstance(mean, ParamRef)
    return root.get_submodule(mean.module)


# -- activations


def _insert_quantizers(found: _Analysis) -> dict[str, FakeQuantize]:
    graph, opgraph, made = found.traced.graph, found.opgraph, found.plan
    nodes = {node.name: node for node in graph.nodes}
    name_of = {node: name for name, node in opgraph.nodes.items()}
    quantizers: dict[str, FakeQuantize] = {}
    constants, ties = opgraph.constants(), made.tie_groups()
    for entry in made:
        if entry.decision != "integer" or entry.role == "weight" or entry.quantizer is None:
            continue
        head = made[entry.quantizer]
        if head.name not in quantizers:
            assert head.scheme is not None
            quantizers[head.name] = FakeQuantize(head.scheme, head.name, fixed=head.fixed, tied=head.name in ties)
        if _on_grid_already(entry, opgraph, made):
            continue
        node = nodes[opgraph.nodes[entry.name]]
        with graph.inserting_after(node):
            call = graph.call_module(
                f"{QUANTIZERS}.{quantizer_key(head.name)}",
                (node,),
                {"constant": True} if entry.name in constants else {},
            )
        call.meta = {"name": None, "shape": node.meta.get("shape"), "source": node.meta.get("source")}
        call.meta["quantizes"] = entry.name
        for user in list(node.users):
            if user is not call and (entry.computed or _reads_codes(user, name_of, found)):
                user.replace_input_with(node, call)
    _mark_last_places(graph)
    graph.lint()
    return quantizers


def _mark_last_places(graph: fx.Graph) -> None:
    """Tell each quantizer call but the last of a tied quantizer that more are to come."""
    later: set[str] = set()
    for node in reversed(graph.nodes):
        if node.meta.get("quantizes") is None:
            continue
        if str(node.target) in later:
            node.kwargs = {**node.kwargs, "last": False}
        later.add(str(node.target))


def _reads_codes(user: fx.Node, name_of: Mapping[str, str], found: _Analysis) -> bool:
    """Whether a node is part of an integer operator (others read the float value where there is one)."""
    if user.name in found.tuples:
        return True
    name = name_of.get(user.name)
    return name is not None and name in found.plan.entries and found.plan[name].computed


def _on_grid_already(entry: PlanEntry, opgraph: OpGraph, made: Plan) -> bool:
    """Whether a concat's result needs no quantizer, because all that goes in has its encoding."""
    op = opgraph.ops.get(entry.name)
    if op is None or op.kind not in ("concat", "stack") or not entry.computed:
        return False
    return all(_owner(t, made) == entry.quantizer for t in op.tensors)


def _owner(name: str, made: Plan) -> str | None:
    e = made[name]
    while e.decision == "inherits":
        if e.kind == "rescale" or e.source_tensor is None:
            return None
        e = made[e.source_tensor]
    return e.quantizer if e.decision == "integer" else None


__all__ = ["plan", "prepare"]
