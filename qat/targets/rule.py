"""`Use` of an operator, and `OperatorRule`: what a device says of one canonical operator kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

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
#: elementwise functions of kind `table` that a rule can name
FUNCTIONS = frozenset(
    {
        "abs", "cos", "elu", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "log", "mish", "neg",
        "pow", "reciprocal", "rsqrt", "sigmoid", "silu", "sin", "softplus", "sqrt", "tanh",
    }
)  # fmt: skip
#: numbers of an operator that a rule can bound from above
LIMITS: Mapping[str, str] = {
    "dilation": "largest dilation of a convolution or pooling",
    "groups": "largest number of groups of a convolution",
    "rank": "largest number of dimensions of the result, the batch included",
    "spatial": "largest number of spatial dimensions of a convolution, pooling or resizing",
}
Symmetric = Literal["activations", "weights"]
#: how an operator reads its parameters that are no weights of a product: as floats, or as codes of their own
Parameters = Literal["float", "quantized"]
#: kinds of operators with such parameters
PARAMETRIC = frozenset({"layer_norm", "prelu"})
_STRICTNESS: tuple[OutputRule, ...] = get_args(OutputRule)


@dataclass(frozen=True)
class Use:
    """One operator of a network, as a target judges it.

    Attributes:
        kind: Canonical kind.
        activation: Scheme of its result.
        weight: Scheme of its weight, or None.
        function: Of kind `table`, the function.
        mode: Of `resize` and `pad`, the mode; of `clamp`, `relu`, `relu6`, `relu_n1_to_1` or `other`.
        traits: What `LIMITS` bounds, as far as the operator has it.
        operands: Integer types of the activations that it reads.
    """

    kind: str
    activation: Scheme
    weight: Scheme | None = None
    function: str = ""
    mode: str = ""
    traits: Mapping[str, int] = field(default_factory=dict)
    operands: frozenset[str] = frozenset()

    @property
    def pair(self) -> tuple[str, str]:
        """Integer types of activation and weight; "" without weight."""
        return self.activation.dtype, self.weight.dtype if self.weight else ""

    @property
    def title(self) -> str:
        """The kind, or the function of a table."""
        return self.function or self.kind


@dataclass(frozen=True)
class OperatorRule:
    """What a target says of one canonical operator kind, or of one function of kind `table`.

    Attributes:
        dtypes: Legal pairs (activation dtype, weight dtype); the weight dtype is "" for operators without weights.
        granularity: Legal weight granularities.
        output: How the output's encoding relates to the inputs'.
        fixed: Where `output` is `fixed`, the prescribed range by activation dtype; other dtypes have one of their own.
        functions: Of `table`, the legal functions with their own rules; None where every function is legal.
        limits: Upper bounds, by the names of `LIMITS`.
        modes: Legal modes of `resize`, `pad` and `clamp`; None for all.
        symmetric: What must have zero point 0 where its type is signed.
        multiplier_below: Every requantization multiplier (scales of the operands over that of the result) must be below
            this; None for no limit. It is known after calibration only, so that exporting checks it.
        parameters: Of `PARAMETRIC` kinds. `quantized`: slopes and factors are 8-bit codes, offsets int32 codes.
        apart: Of functions: what compiles the exported model would fuse it with a product before it, and wrongly, so
            that it is written on another shape, which is not recognized.
        instead: What to write instead of an operator that has no legal dtypes.
    """

    dtypes: frozenset[tuple[str, str]]
    granularity: frozenset[GranularityKind] = frozenset({"per_tensor"})
    output: OutputRule = "own"
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    functions: Mapping[str, OperatorRule] | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    modes: frozenset[str] | None = None
    symmetric: frozenset[Symmetric] = frozenset()
    multiplier_below: float | None = None
    parameters: Parameters = "float"
    apart: bool = False
    instead: str = ""

    def fault(self, use: Use) -> str | None:
        """Say what of a use is not legal, such as `uint16/uint8 conv`, or return None.

        Types come first, then what the scheme says besides, then the operator's own shape.
        """
        if use.pair not in self.dtypes:
            return f"{'/'.join(filter(None, use.pair))} {use.title}"
        if use.weight and use.weight.granularity.kind not in self.granularity:
            return f"{use.weight.granularity.kind} weights for {use.title}"
        for what, scheme in (("activations", use.activation), ("weights", use.weight)):
            if scheme is not None and what in self.symmetric and asymmetric(scheme):
                return f"asymmetric {what} for {use.title}"
        return self.shape_fault(use)

    def shape_fault(self, use: Use) -> str | None:
        """Say what of the operator itself, whatever its types, is not legal."""
        if self.modes is not None and use.mode not in self.modes:
            return f"{use.mode} {use.title}"
        for name, limit in self.limits.items():
            if use.traits.get(name, 0) > limit:
                return f"{use.title} with {name} {use.traits[name]} (at most {limit})"
        return None

    def intersect(self, other: OperatorRule, kind: str) -> OperatorRule:
        """Return the rule that satisfies both.

        Raises:
            TargetError: Both prescribe an output range, and not the same one; or one prescribes it and the other wants
                the input's.
        """
        dtypes = self.dtypes & other.dtypes
        activations = {activation for activation, _ in dtypes}
        for dtype in sorted(activations & set(self.fixed) & set(other.fixed)):
            if self.fixed[dtype] != other.fixed[dtype]:
                raise TargetError(
                    f"{kind}: one target prescribes the output range {self.fixed[dtype]} of {dtype}, another "
                    f"{other.fixed[dtype]}",
                    "build for these targets separately",
                )
        fixed = {d: r for d, r in {**self.fixed, **other.fixed}.items() if d in activations}
        output = max(self.output, other.output, key=_STRICTNESS.index)
        if fixed and {self.output, other.output} & {"inherit", "tie"}:
            raise TargetError(
                f"{kind}: one target prescribes the output range, another wants that of the input",
                "build for these targets separately",
            )
        mine, theirs = self.functions, other.functions
        return OperatorRule(
            dtypes=dtypes,
            granularity=self.granularity & other.granularity,
            output="own" if output == "fixed" and not fixed else output,
            fixed=fixed,
            functions=_functions(self, other) if mine is not None or theirs is not None else None,
            limits={**other.limits, **{k: min(v, other.limits.get(k, v)) for k, v in self.limits.items()}},
            modes=_both(self.modes, other.modes),
            symmetric=self.symmetric | other.symmetric,
            multiplier_below=min(
                (m for m in (self.multiplier_below, other.multiplier_below) if m is not None), default=None
            ),
            parameters=max(self.parameters, other.parameters, key=get_args(Parameters).index),
            apart=self.apart or other.apart,
            instead=self.instead or other.instead,
        )


def _both(a: frozenset[str] | None, b: frozenset[str] | None) -> frozenset[str] | None:
    return b if a is None else a if b is None else a & b


def asymmetric(scheme: Scheme) -> bool:
    """Whether a signed tensor may get a zero point other than 0."""
    return scheme.int_type.signed and not scheme.symmetric


def _functions(a: OperatorRule, b: OperatorRule) -> dict[str, OperatorRule]:
    names = set(FUNCTIONS if a.functions is None else a.functions) & set(
        FUNCTIONS if b.functions is None else b.functions
    )
    return {name: function_rule(a, name).intersect(function_rule(b, name), name) for name in sorted(names)}


def function_rule(rule: OperatorRule, name: str) -> OperatorRule:
    """Return the rule of one function of a `table` rule that has it."""
    return rule if rule.functions is None else rule.functions[name]
