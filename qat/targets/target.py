"""`Target`: what a device, or every one of several devices, can execute in integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from qat.scheme import Scheme, int_type
from qat.targets.rule import KINDS, OperatorRule, OutputRule, Use, asymmetric, function_rule

__all__ = ["KINDS", "OperatorRule", "OutputRule", "Refusal", "Target"]

#: what computes an operator that has no integer form: floats of this type, or nothing (`none`)
Floats = Literal["float32", "float16", "none"]
#: order of dimensions in the artifact; `NCHW` is the one of PyTorch
Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Refusal:
    """Why an operator is not computed in integers.

    Attributes:
        targets: Names of the targets that refuse it.
        faults: What they have not, one for each of `targets`.
        nearest: The nearest legal configuration, or "" where there is none.
        stranded: Other targets, which have it in integers and have no floats: they get it in float with the rest.
    """

    targets: tuple[str, ...]
    faults: tuple[str, ...]
    nearest: str = ""
    stranded: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """One line, such as `hexagon-v73 has no uint16/uint8 conv; nearest: uint16/int8`."""
        by_fault: dict[str, list[str]] = {}
        for target, fault in zip(self.targets, self.faults, strict=True):
            by_fault.setdefault(fault, []).append(target)
        parts = [f"{_listed(who)} {'have' if who[1:] else 'has'} no {what}" for what, who in by_fault.items()]
        text = ", ".join(parts)
        if self.stranded:
            text += f", and {_listed(list(self.stranded))} {'have' if self.stranded[1:] else 'has'} no floats"
        return text + (f"; nearest: {self.nearest}" if self.nearest else "")


@dataclass(frozen=True)
class Target:
    """What a device can execute in integers.

    Attributes:
        name: Such as `arm-cpu`; the names joined by `+` for an intersection.
        title: One line for people.
        version: Version of the data file(s).
        numerics: Numerics profile, `onnx` or `tflite`.
        dynamic_batch: Whether the batch size may be left open.
        activations: Default scheme of activations.
        weights: Default scheme of weights.
        operators: Rules by canonical operator kind; a kind that is absent stays float.
        floats: What computes an operator that has no integer form.
        layout: Order of the dimensions of images in the target's artifacts.
        mixed_dtypes: Whether an operator may read activations of another integer type than it writes.
        sources: Where the facts come from.
        parts: The single targets of an intersection; empty for a single one.
    """

    name: str
    title: str
    version: str
    numerics: str
    dynamic_batch: bool
    activations: Scheme
    weights: Scheme
    operators: Mapping[str, OperatorRule]
    floats: Floats = "float32"
    layout: Layout = "NCHW"
    mixed_dtypes: bool = True
    sources: tuple[str, ...] = ()
    parts: tuple[Target, ...] = ()

    @property
    def singles(self) -> tuple[Target, ...]:
        """The single targets that this one is made of."""
        return self.parts or (self,)

    def intersect(self, other: Target) -> Target:
        """Return the target that all devices of both satisfy.

        Default schemes, the numerics and the layout are those of `self`: the first target that is named is the one
        whose arithmetic is simulated; the others compute the same network with roundings of their own.

        Raises:
            TargetError: Their rules contradict each other.
        """
        kinds = [kind for kind in self.operators if kind in other.operators]
        return Target(
            name=f"{self.name}+{other.name}",
            title=f"{self.title}; {other.title}",
            version=f"{self.version}+{other.version}",
            numerics=self.numerics,
            dynamic_batch=self.dynamic_batch and other.dynamic_batch,
            activations=self.activations,
            weights=self.weights,
            operators={kind: self.operators[kind].intersect(other.operators[kind], kind) for kind in kinds},
            floats=max(self.floats, other.floats, key=get_args(Floats).index),
            layout=self.layout,
            mixed_dtypes=self.mixed_dtypes and other.mixed_dtypes,
            sources=tuple(dict.fromkeys((*self.sources, *other.sources))),
            parts=(*self.singles, *other.singles),
        )

    def rule(self, kind: str, function: str = "") -> OperatorRule | None:
        """Return the rule of a kind (of a function, where the rule of `table` tells them apart), or None."""
        rule = self.operators.get(kind)
        if rule is None or not function or rule.functions is None:
            return rule
        return rule.functions.get(function)

    def refusal(self, use: Use) -> Refusal | None:
        """Say which targets cannot execute an operator in integers, why, and what is legal; None where all can."""
        faults = [(target, fault) for target in self.singles if (fault := target._fault(use)) is not None]
        if not faults:
            return None
        refusing = tuple(target.name for target, _ in faults)
        return Refusal(
            targets=refusing,
            faults=tuple(fault for _, fault in faults),
            nearest=self.nearest(use),
            stranded=tuple(t.name for t in self.singles if t.floats == "none" and t.name not in refusing),
        )

    def _fault(self, use: Use) -> str | None:
        rule = self.rule(use.kind, use.function)
        if rule is None or not rule.dtypes:
            return f"integer {use.title}"
        fault = rule.fault(use)
        others = sorted(use.operands - {use.activation.dtype})
        if fault is None and others and not self.mixed_dtypes:
            return f"{use.title} that reads {', '.join(others)} and writes {use.activation.dtype}"
        return fault

    def nearest(self, use: Use) -> str:
        """Return the legal configuration that differs least from a use, such as `uint16/int8 per_tensor`, or "".

        Types of as many bits are nearer than others, more bits nearer than fewer, and the activations' type is kept
        before the weight's.
        """
        rule = self.rule(use.kind, use.function)
        if rule is None or not rule.dtypes:
            return next((r.instead for t in self.singles if (r := t.rule(use.kind, use.function)) and r.instead), "")
        if any(t.rule(use.kind, use.function) is None for t in self.singles) or rule.shape_fault(use):
            return ""
        wanted_pair = use.pair
        pair = min(
            sorted(rule.dtypes), key=lambda p: (_distance(p[0], wanted_pair[0]), _distance(p[1], wanted_pair[1]))
        )
        text = "/".join(filter(None, pair))
        if use.weight is not None and use.weight.granularity.kind not in rule.granularity:
            text += f" {min(rule.granularity)}"
        schemes = {"activations": use.activation, "weights": use.weight}
        wanted = [w for w in sorted(rule.symmetric) if (s := schemes[w]) is not None and asymmetric(s)]
        if wanted:
            text += f" with symmetric {' and '.join(wanted)}"
        if use.operands - {use.activation.dtype} and not self.mixed_dtypes:
            text += " read and written"
        return text


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _distance(legal: str, wanted: str) -> tuple[int, int, bool]:
    """How far a type is from the wanted one: fewer bits, more bits, other sign."""
    if not legal or not wanted:
        return 0, 0, False
    a, b = int_type(legal), int_type(wanted)
    # of two types as far away, the one with more bits keeps the accuracy
    return abs(a.bits - b.bits), int(a.bits < b.bits), a.signed != b.signed


def rules(target: Target) -> Iterable[tuple[str, str, OperatorRule]]:
    """Every rule of a target: kind, function ("" but for functions with their own), rule."""
    for kind, rule in target.operators.items():
        if rule.functions is None:
            yield kind, "", rule
        else:
            for name in rule.functions:
                yield kind, name, function_rule(rule, name)
