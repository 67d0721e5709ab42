"""Deciding what of an operator graph becomes integer on a target."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from qat.errors import PlanError, SchemeError
from qat.graph.fusions import Fusion, find_fusions
from qat.graph.opgraph import GraphOp, OpGraph
from qat.graph.plan import Constraints, Plan, PlanEntry
from qat.graph.ranges import place_ranges
from qat.graph.traits import mode_of, traits
from qat.observers import check_observer
from qat.quantizers.method import Role
from qat.quantizers.registry import make_method
from qat.scheme import Granularity, Scheme
from qat.schemes import Schemes
from qat.targets import Refusal, Target, Use

#: operators that only move codes; the encoding of the output is the input's
_MOVING = frozenset({"max_pool", "reshape", "transpose", "slice", "expand", "identity", "rescale", "chain"})
_TIED = frozenset({"concat", "stack"})


def plan_graph(graph: OpGraph, target: Target, schemes: Schemes) -> Plan:
    """Plan every value and weight of an operator graph.

    Raises:
        PlanError: Nothing can be quantized.
    """
    planner = _Planner(graph, target, schemes)
    entries = planner.entries()
    operators = [e for e in entries.values() if e.role == "activation" and e.decision != "constant"]
    if not any(e.computed for e in operators):
        first = next((f"{e.name}: {e.reason}" for e in operators if e.decision != "fused"), "it has no operators")
        raise PlanError(f"the model has nothing to quantize ({first})", "check the target, the scheme and the layers")
    bounds = {kind: r.multiplier_below for kind, r in target.operators.items() if r.multiplier_below is not None}
    coded = tuple(sorted(kind for kind, r in target.operators.items() if r.parameters == "quantized"))
    table = target.operators.get("table")
    apart = tuple(sorted(name for name, r in ((table and table.functions) or {}).items() if r.apart))
    constraints = Constraints(target.dynamic_batch, bounds, target.layout, target.floats, coded, apart)
    return Plan(target.name, target.numerics, entries, tuple(_without_effect(graph, schemes)), constraints=constraints)


def _without_effect(graph: OpGraph, schemes: Schemes) -> Iterator[str]:
    """Say which layer rules, or parts of them, name no tensor that they could act on."""
    ops = list(graph.ops)
    values = [*graph.inputs, *graph.parameters, *ops]
    weighted = [op.name for op in graph.ops.values() if op.weight]
    for rule in schemes.layers:
        pattern = f"scheme.layers: the pattern {rule.pattern!r} matches"
        if not any(rule.matches(name) for name in values):
            near = difflib.get_close_matches(rule.pattern, values, n=1)
            yield f"{pattern} no tensor" + (f" (did you mean {near[0]!r}?)" if near else "")
        elif rule.float_ and not any(rule.matches(name) for name in ops):
            yield f"{pattern} no operator; to keep an input float, name the operators that read it"
        elif rule.weights and not any(rule.matches(name) for name in weighted):
            yield f"{pattern} no operator with a weight"


class _Planner:
    """The state of one planning run; `entries` is its result."""

    def __init__(self, graph: OpGraph, target: Target, schemes: Schemes) -> None:
        self.graph, self.target, self.schemes = graph, target, schemes
        self.fusions = find_fusions(graph)
        self.fusion_of = {op.name: end for end, fusion in self.fusions.items() for op in fusion.ops}
        self.constants = graph.constants()
        self.users = graph.users()
        self.infinite = self._infinite()
        self.refusals: dict[str, Refusal] = {}
        self.reasons = {end: self._refusal(fusion) for end, fusion in self.fusions.items()}
        self._settle_shared_weights()
        self.wanted = self._wanted()
        self.heads: dict[str, str] = {}

    # -- which operators can be integer

    def _refusal(self, fusion: Fusion) -> str | None:
        """Why a fusion is computed in float, or None."""
        op = fusion.ops[0]
        if any(self.schemes.is_float(o.name) for o in fusion.ops):
            return "float by the scheme's layers"
        if op.kind == "island":
            return str(op.attrs.get("cause", "no integer form"))
        masked = next((name for name in op.tensors if name in self.infinite), None)
        if masked is not None:
            return f"its input {masked} may be infinite"
        scheme = self._activation_scheme(fusion.ops[-1].name)
        operands = frozenset(self._read_scheme(t).dtype for t in op.tensors)
        for kind, attrs in self._steps(op):
            use = Use(
                kind, scheme, self._weight_scheme(op), str(attrs.get("function", "")) if kind == "table" else "",
                mode_of(kind, attrs), traits(op, kind, attrs), operands,
            )  # fmt: skip
            refusal = self.target.refusal(use)
            if refusal is not None:
                self.refusals[fusion.ops[-1].name] = refusal
                return refusal.reason
        return None

    def _read_scheme(self, name: str) -> Scheme:
        """The activation scheme of the codes that a reader of `name` gets: that of the tensor whose codes they are."""
        op = self.graph.ops.get(name)
        while op is not None and self._moves(op):
            name = op.tensors[0]
            op = self.graph.ops.get(name)
        return self._activation_scheme(self.fusion_of.get(name, name))

    def _infinite(self) -> frozenset[str]:
        """Values that hold infinities by design: scores masked with -inf, up to the softmax that reads them."""
        found: set[str] = set()
        for op in self.graph.ops.values():
            passes_on = op.kind not in ("softmax", "table", "clamp", "island")
            if op.attrs.get("infinite") or (passes_on and any(name in found for name in op.tensors)):
                found.add(op.name)
        return frozenset(found)

    def _settle_shared_weights(self) -> None:
        """Let all operators that share a weight be integer, or all float: there is one weight in training.

        Raises:
            PlanError: Two of them quantize the weight differently.
        """
        sharing: dict[str, list[str]] = {}
        for end, fusion in self.fusions.items():
            if fusion.ops[0].weight is not None:
                sharing.setdefault(fusion.ops[0].weight.key, []).append(end)
        for key, ends in sharing.items():
            floats = [end for end in ends if self.reasons[end] is not None]
            if floats:
                for end in ends:
                    self.reasons[end] = self.reasons[end] or f"shares {key} with {floats[0]}, which is float"
                continue
            first, *others = (self.fusions[end].ops[0] for end in ends)
            for other in others:
                mine, theirs = self._weight_scheme(first), self._weight_scheme(other)
                if mine != theirs:
                    assert mine is not None
                    assert theirs is not None
                    raise PlanError(
                        f"{key} would be {mine.describe()} in {first.name} and {theirs.describe()} in {other.name}",
                        "give these layers the same weight scheme, or leave them float",
                    )

    @staticmethod
    def _steps(op: GraphOp) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Kinds that an operator is made of, as targets know them, with their attributes."""
        if op.kind == "chain":
            steps = {("slice" if kind == "roll" else kind): attrs for kind, attrs in op.attrs["steps"]}
            return tuple(steps.items())
        return (("concat" if op.kind == "stack" else op.kind, op.attrs),)

    def _activation_scheme(self, name: str) -> Scheme:
        fusion = self.fusions.get(name)
        scheme = self.schemes.activation(*(op.name for op in fusion.ops) if fusion else (name,))
        if scheme.granularity.kind != "per_tensor":
            raise SchemeError(
                f"the activation {name!r} would be quantized {scheme.granularity.kind}", "write per_tensor"
            )
        _check(scheme, name, "activation")
        return scheme

    def _weight_scheme(self, op: GraphOp) -> Scheme | None:
        if op.weight is None:
            return None
        scheme = self.schemes.weight(op.name)
        _check(scheme, op.weight.key, "weight")
        if scheme.granularity.kind == "per_tensor":
            return scheme
        if self._by_tensor_only(op, scheme):
            return scheme.with_(granularity=Granularity())
        if scheme.granularity.kind == "per_group":
            # runs of input channels: the blocks of ONNX's DequantizeLinear along the axis that is summed over
            return scheme.with_(granularity=Granularity("per_group", 1, scheme.granularity.size))
        if op.kind == "conv_transpose":
            # ONNX and TFLite share a scale over axis 1 of [Cin, Cout/groups, ...]; with groups that is not one a
            # channel
            grouped = op.attrs.get("groups", 1) > 1
            return scheme.with_(granularity=Granularity() if grouped else Granularity("per_channel", 1))
        return scheme.with_(granularity=Granularity("per_channel", 0))

    def _by_tensor_only(self, op: GraphOp, scheme: Scheme) -> bool:
        """Whether a default by channel gives way, because the target has the operator by tensor only."""
        rule = self.target.rule(op.kind)
        default = self.target.weights.granularity.kind == scheme.granularity.kind == "per_channel"
        return default and rule is not None and rule.granularity == {"per_tensor"}

    # -- which values need codes

    def _moves(self, op: GraphOp) -> bool:
        """Whether the operator's output has the input's encoding."""
        if op.kind == "pad":
            return op.attrs.get("mode") != "constant" or op.attrs.get("value", 0.0) == 0.0
        if op.kind == "resize" and op.attrs.get("mode") == "nearest":
            return True
        if op.kind in _MOVING:
            return True
        rule = self.target.operators.get(op.kind)
        return rule is not None and rule.output == "inherit"

    def _wanted(self) -> set[str]:
        """Values that some integer operator reads, directly or through operators that only move codes."""
        wanted: set[str] = set()
        for end, fusion in reversed(self.fusions.items()):
            op = fusion.ops[0]
            if self.reasons[end] is not None:
                continue
            if not self._moves(op) or end in wanted:
                wanted.update(t for o in fusion.ops for t in o.tensors)
        return wanted

    # -- entries

    def entries(self) -> dict[str, PlanEntry]:
        entries: dict[str, PlanEntry] = {}
        for name in self.graph.inputs:
            entries[name] = self._leaf(name, "input")
        for name in self.graph.parameters:
            entries[name] = self._leaf(name, "parameter")
        for end, fusion in self.fusions.items():
            for inner in fusion.ops[:-1]:
                into = fusion.ops[-1]
                entries[inner.name] = PlanEntry(
                    inner.name, "activation", inner.kind, "fused", source_tensor=end, macs=inner.macs,
                    reason=f"computed with {into.name} ({into.kind})", source=inner.source,
                    computed=self.reasons[end] is None,
                )  # fmt: skip
            entries[end] = self._operator(end, fusion, entries)
            weight = self._weight_entry(fusion)
            if weight is not None and weight.name not in entries:
                entries[weight.name] = weight
        return place_ranges(self.graph, self._tie(entries), self.target.activations.observer)

    def _leaf(self, name: str, role: Literal["input", "parameter"]) -> PlanEntry:
        if name not in self.wanted or name not in self.graph.shapes:
            return PlanEntry(name, role, "", "float", reason="no integer operator reads it", computed=False)
        if role == "parameter" and all(user.name in self.constants for user in self.users.get(name, [])):
            return PlanEntry(name, "parameter", "", "constant", reason="folded", computed=False)
        reason = "model input" if role == "input" else "constant operand"
        scheme = self._activation_scheme(name)
        return PlanEntry(name, role, "", "integer", scheme, name, reason=reason, computed=False)

    def _operator(self, end: str, fusion: Fusion, entries: Mapping[str, PlanEntry]) -> PlanEntry:
        op, last, refusal = fusion.ops[0], fusion.ops[-1], self.reasons[end]
        entry = PlanEntry(
            end, "activation", last.kind, "float", macs=last.macs, source=op.source, refusal=self.refusals.get(end)
        )
        if end in self.constants:
            if all(user.name in self.constants for user in self.users.get(end, [])) or end not in self.wanted:
                return replace(entry, decision="constant", reason="depends on parameters only", computed=False)
            return replace(
                entry, role="parameter", decision="integer", scheme=self._activation_scheme(end), quantizer=end,
                computed=False, reason="constant operand",
            )  # fmt: skip
        moves_floats = self._moves(op) and entries[op.tensors[0]].decision in ("float", "constant")
        if refusal is None and moves_floats and end not in self.wanted:
            return replace(entry, reason="its input is float", computed=False)
        if refusal is not None:
            if end in self.wanted:
                return replace(
                    entry, decision="integer", scheme=self._activation_scheme(end), quantizer=end, computed=False,
                    reason=f"{refusal}; its result is quantized for its integer readers",
                )  # fmt: skip
            return replace(entry, reason=refusal, computed=False)
        if self._moves(op):
            source = op.tensors[0]
            how = "the codes of" if op.kind != "rescale" else "a multiple of the scale of"
            reason, scheme = f"{how} {source}", entries[source].scheme
            return replace(entry, decision="inherits", scheme=scheme, source_tensor=source, reason=reason)
        kind, attrs = self._steps(op)[0]
        rule = self.target.rule(kind, str(attrs.get("function", "")) if kind == "table" else "")
        scheme = self._activation_scheme(end)
        fixed = rule.fixed.get(scheme.dtype) if rule is not None and len(fusion.ops) == 1 else None
        if fixed is not None:
            # the range is exact: a symmetric grid would be another one
            scheme = scheme.with_(symmetric=False)
        reason = "+".join(o.kind for o in fusion.ops) if len(fusion.ops) > 1 else "range of its own"
        return replace(
            entry, decision="integer", scheme=scheme, quantizer=end, fixed=fixed,
            reason="range fixed by the target" if fixed else reason,
        )  # fmt: skip

    def _weight_entry(self, fusion: Fusion) -> PlanEntry | None:
        op = fusion.ops[0]
        if op.weight is None:
            return None
        scheme = self._weight_scheme(op)
        if self.reasons[fusion.ops[-1].name] is not None:
            return PlanEntry(op.weight.key, "weight", op.kind, "float", reason=f"{op.name} is float", computed=False)
        norm = fusion.batch_norm
        reasons = [f"with {norm.name} folded in"] if norm else []
        if scheme != self.schemes.weight(op.name) and scheme is not None and scheme.granularity.kind == "per_tensor":
            whole = self._by_tensor_only(op, self.schemes.weight(op.name))
            cause = f"{self.target.name} has no other for {op.kind}" if whole else "the groups share the channel axis"
            reasons.append(f"one scale: {cause}")
        return PlanEntry(
            op.weight.key, "weight", op.kind, "integer", scheme, op.weight.key, macs=0,
            source_tensor=norm.name if norm else None, reason="; ".join(reasons),
        )  # fmt: skip

    # -- ties

    def _tie(self, entries: dict[str, PlanEntry]) -> dict[str, PlanEntry]:
        """Give all inputs and the output of each concat one quantizer, where their schemes allow it."""
        head = {name: name for name, e in entries.items() if e.decision == "integer"}

        def find(name: str) -> str:
            while head[name] != name:
                head[name] = head[head[name]]
                name = head[name]
            return name

        order = {name: position for position, name in enumerate(entries)}
        tied: set[str] = set()
        for fusion in self.fusions.values():
            op = fusion.ops[0]
            if op.kind not in _TIED or entries[op.name].decision != "integer" or not entries[op.name].computed:
                continue
            for source in op.tensors:
                root = self._owner(source, entries)
                if root is None or not _compatible(entries[root], entries[op.name]):
                    continue
                a, b = find(root), find(op.name)
                first, second = (a, b) if order[a] <= order[b] else (b, a)
                head[second] = first
                tied.update((root, op.name))
        for name in tied:
            group = find(name)
            e = entries[name]
            reason = e.reason if group == name else f"{e.reason}; tied to {group}"
            entries[name] = replace(e, quantizer=group, reason=reason)
        return entries

    @staticmethod
    def _owner(name: str, entries: Mapping[str, PlanEntry]) -> str | None:
        """The tensor whose range `name` uses, or None where its codes are rescaled on the way or it is float."""
        e = entries[name]
        while e.decision == "inherits":
            if e.kind == "rescale" or e.source_tensor is None:
                return None
            e = entries[e.source_tensor]
        return e.name if e.decision == "integer" else None


def _check(scheme: Scheme, name: str, role: Role) -> None:
    """Refuse what only the quantizers would refuse, so that a plan is never promised in vain."""
    try:
        check_observer(scheme.observer)
        make_method(scheme, role)
    except SchemeError as error:
        raise SchemeError(f"{name!r}: {error}") from None


def _compatible(a: PlanEntry, b: PlanEntry) -> bool:
    return a.fixed is None and b.fixed is None and a.scheme == b.scheme
