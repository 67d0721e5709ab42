"""`plan` and `prepare`: from a float model to a plan, and to a model with fake quantization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from qat.errors import PlanError, TraceError
from qat.graph.decompose import decompose
from qat.graph.finite import refuse_nonfinite
from qat.graph.fusions import find_fusions
from qat.graph.islands import locate_islands
from qat.graph.operators import ParamRef, recognize
from qat.graph.opgraph import TUPLE_KINDS, GraphOp, OpGraph, build_opgraph
from qat.graph.plan import Plan, PlanEntry
from qat.graph.planner import plan_graph
from qat.graph.prepared import QUANTIZERS, PreparedModel, quantizer_key
from qat.graph.spell import spell_for
from qat.graph.trace import Traced, trace
from qat.quantizers import FakeQuantize, WeightFakeQuantize
from qat.scheme import ObserverSpec, Scheme
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
        TraceError: The model cannot be copied, or not be traced at all.
        PlanError: Nothing in it can be quantized, layers that share a weight have different schemes for it, or a weight
            that is to be quantized is parametrized already.
        SchemeError: `scheme` has an unknown key or an impossible value.
        StateError: A lazily built module was never run.
        DataError: A parameter or a batch norm's statistic holds nan or inf, or a buffer nan.
    """
    return _analyse(_copy(model), example_inputs, target, scheme).plan


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Target,
    scheme: Schemes | Mapping[str, Any] | None = None,
    fused: bool = True,
) -> PreparedModel:
    """Return a trainable copy of a model with fake quantization at the planned places.

    Weights are fake-quantized by parametrization, with the scaling of a following batch norm; every planned activation
    gets one fake-quantizer. All parameters and buffers exist with their final shapes. The phase is `float` until
    `calibrate`.

    Args:
        model: As for `plan`.
        example_inputs: As for `plan`.
        target: As for `plan`.
        scheme: As for `plan`.
        fused: Call `optimize_for_training` on the result.

    Raises:
        PlanError: A member of the model has a name that `PreparedModel` needs; and all that `plan` raises.
    """
    root = _copy(model)
    modes = {module: module.training for module in root.modules()}
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
    prepared = PreparedModel(root, traced.graph, found.opgraph, found.plan, quantizers, dtypes, traced.structure)
    for module in prepared.modules():
        module.training = modes.get(module, root.training)
    return optimize_for_training(prepared) if fused else prepared


def optimize_for_training(qmodel: PreparedModel, enabled: bool = True) -> PreparedModel:
    """Let a prepared model run batch norm, additions, activations and their fake quantization in fused passes.

    Results and gradients are those of the single modules up to the rounding of float32, and so is the state, which does
    not tell whether a model was fused. The passes are native (see `qat.native.status`); where one has no such form,
    under hooks, autocast or `torch.compile`, on other devices and dtypes, the modules are called.

    Args:
        qmodel: The model, which is changed.
        enabled: False: call the modules one by one.

    Returns:
        The model.
    """
    qmodel.fused = enabled
    return qmodel


def _input_dtypes(found: _Analysis) -> dict[str, torch.dtype]:
    return {
        node.meta["name"]: node.meta["vals"][0].dtype
        for node in found.traced.graph.nodes
        if node.op == "placeholder" and node.meta.get("shape") is not None
    }


def _analyse(
    root: nn.Module, example_inputs: Any, target: Target, scheme: Schemes | Mapping[str, Any] | None
) -> _Analysis:
    refuse_nonfinite(root.named_parameters(), root.named_buffers())
    # says what is wrong before the model is looked at
    given = make_schemes(scheme, target.activations, target.weights)
    traced = trace(root, example_inputs)
    operators = recognize(traced)
    if decompose(traced, operators, target, given):
        operators = recognize(traced)
    opgraph = spell_for(locate_islands(build_opgraph(traced.graph, operators), traced), target)
    schemes = make_schemes(scheme, _default_activations(opgraph, target), target.weights)
    made = plan_graph(opgraph, target, schemes)
    if traced.static_batch is not None:
        size = traced.batches[0]
        warning = f"the model works for batches of {size} only ({traced.static_batch}); its export has this batch size"
        made = replace(made, batch_size=size, warnings=(*made.warnings, warning))
    _refuse_parametrized(root, opgraph, made)
    tuples = frozenset(node.name for node, op in operators.items() if op.kind in TUPLE_KINDS)
    return _Analysis(traced, opgraph, made, tuples)


def _default_activations(opgraph: OpGraph, target: Target) -> Scheme:
    """Return the scheme of activations that nobody has chosen: the target's, with `auto` in networks with layer norms.

    In a transformer few tokens may decide the outputs, and be small beside the others: the range with the least error
    over all elements is not the one with the least error of the outputs (docs/methods.md).
    """
    scheme = target.activations
    normed = any(op.kind == "layer_norm" for op in opgraph.ops.values())
    return scheme.with_(observer=ObserverSpec("auto")) if normed and scheme.observer.name == "histogram" else scheme


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        cause = str(error).split(". ", 1)[0].strip().rstrip(".")
        raise TraceError(
            f"the {type(model).__name__} cannot be copied ({cause})",
            "detach the tensors that it keeps; remove torch.nn.utils.weight_norm by remove_weight_norm",
        ) from error


# -- weights


def _refuse_parametrized(root: nn.Module, opgraph: OpGraph, made: Plan) -> None:
    for op in opgraph.ops.values():
        if op.weight is None or made[op.weight.key].decision != "integer":
            continue
        if parametrize.is_parametrized(root.get_submodule(op.weight.module), op.weight.attribute):
            raise PlanError(
                f"the weight of {op.name} is parametrized already",
                "remove_parametrizations (torch.nn.utils.parametrize) first, or leave the layer float",
            )


def _parametrize_weights(root: nn.Module, found: _Analysis) -> None:
    quantizers: dict[str, WeightFakeQuantize] = {}
    for fusion in find_fusions(found.opgraph).values():
        op = fusion.ops[0]
        if op.weight is None or found.plan[op.weight.key].decision != "integer":
            continue
        key, attribute = op.weight.key, op.weight.attribute
        owner = root.get_submodule(op.weight.module)
        if parametrize.is_parametrized(owner, attribute):
            continue
        scheme = found.plan[key].scheme
        assert scheme is not None
        if key not in quantizers:
            value = getattr(owner, attribute)
            quantizers[key] = WeightFakeQuantize(
                scheme,
                key,
                tuple(value.shape),
                norm_module(root, fusion.batch_norm),
                channel_axis=1 if op.kind == "conv_transpose" else 0,
                groups=op.attrs["groups"] if op.kind == "conv_transpose" else 1,
            ).to(value.device)
        # modules that share a weight share its quantizer
        parametrize.register_parametrization(owner, attribute, quantizers[key])
        if owner is root:
            _call_parametrization(found.traced.graph, attribute)


def _call_parametrization(graph: fx.Graph, attribute: str) -> None:
    """Read a parametrized weight of the root, whose class the prepared model does not inherit, from its chain."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == attribute:
            node.op, node.target = "call_module", f"parametrizations.{attribute}"


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


__all__ = ["optimize_for_training", "plan", "prepare"]
