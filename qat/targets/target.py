"""`Target`: what a device, or every one of several devices, can execute in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qat.errors import TargetError
from qat.scheme import GranularityKind, Scheme

#: `own`: the output has a range of its own; `inherit`: the output must have the input's encoding; `tie`: all inputs and
#: the output must share one encoding; `fixed`: the output's range is prescribed.
OutputRule = Literal["own", "inherit", "tie", "fixed"]
#: canonical operator kinds that a target can have a rule for (docs/architecture.md); a `stack` is a concat, and a
#: `chain` is the kinds of its steps
KINDS = frozenset(
    {
        "add", "avg_pool", "batch_norm", "clamp", "concat", "conv", "conv_transpose", "div", "expand", "identity",
        "layer_norm", "linear", "matmul", "max_pool", "mean", "mul", "pad", "prelu", "rescale", "reshape", "resize",
        "slice", "softmax", "sub", "table", "transpose",
    }
)  # fmt: skip
_STRICTNESS: tuple[OutputRule, ...] = ("own", "inherit", "tie", "fixed")


@dataclass(frozen=True)
class OperatorRule:
    """What a target says of one canonical operator kind.

    Attributes:
        dtypes: Legal pairs (activation dtype, weight dtype); the weight dtype is "" for operators without weights.
        granularity: Legal weight granularities.
        output: How the output's encoding relates to the inputs'.
        fixed: The prescribed output range where `output` is `fixed`.
    """

    dtypes: frozenset[tuple[str, str]]
    granularity: frozenset[GranularityKind]
    output: OutputRule = "own"
    fixed: tuple[float, float] | None = None

    def intersect(self, other: OperatorRule, kind: str) -> OperatorRule:
        """Return the rule that satisfies both.

        Raises:
            TargetError: Both prescribe an output range, and not the same one.
        """
        if self.fixed and other.fixed and self.fixed != other.fixed:
            raise TargetError(
                f"{kind}: one target prescribes the output range {self.fixed}, another {other.fixed}",
                "build for these targets separately",
            )
        return OperatorRule(
            dtypes=self.dtypes & other.dtypes,
            granularity=self.granularity & other.granularity,
            output=max(self.output, other.output, key=_STRICTNESS.index),
            fixed=self.fixed or other.fixed,
        )


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
    """

    name: str
    title: str
    version: str
    numerics: str
    dynamic_batch: bool
    activations: Scheme
    weights: Scheme
    operators: Mapping[str, OperatorRule]

    def intersect(self, other: Target) -> Target:
        """Return the target that both devices satisfy; default schemes and the numerics are those of `self`.

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
        )

    def refusal(self, kind: str, activation: str, weight: Scheme | None) -> str | None:
        """Say why the target cannot execute an operator in integers, or return None where it can.

        Args:
            kind: Canonical operator kind.
            activation: dtype of its activations.
            weight: Scheme of its weight, if it has one.
        """
        rule = self.operators.get(kind)
        if rule is None:
            return f"{self.name} has no integer {kind}"
        pair = (activation, weight.dtype if weight else "")
        if pair not in rule.dtypes:
            legal = ", ".join("/".join(filter(None, p)) for p in sorted(rule.dtypes)) or "none"
            return f"{self.name} has no {'/'.join(filter(None, pair))} {kind} (legal: {legal})"
        if weight and weight.granularity.kind not in rule.granularity:
            return f"{self.name} has no {weight.granularity.kind} weights for {kind}"
        return None
