"""`Plan`: what becomes integer, what stays float, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qat.files import atomic_write_text
from qat.scheme import Scheme
from qat.targets import Refusal
from qat.targets.target import Floats, Layout

Decision = Literal["integer", "inherits", "fused", "float", "constant"]
#: of an operator: computed in integers, in float on the target, or not at all on (one of) the target(s)
Forecast = Literal["integer", "float island", "refused"]
Role = Literal["input", "parameter", "activation", "weight"]
_MILLION = 10**6


@dataclass(frozen=True)
class PlanEntry:
    """What the plan says of one tensor.

    Attributes:
        name: Tensor name, or `state_dict` key of a weight.
        role: `input` of the model, `parameter` that an operator reads as a tensor, `activation`, or `weight`.
        kind: Canonical kind of the operator that computes it ("" for inputs and parameters).
        decision: `integer`: has codes from a range of its own or of its tie group; `inherits`: has the codes' encoding
            of `source_tensor`; `fused`: exists only inside the operator that ends in `source_tensor`; `float`;
            `constant`: folded into a constant.
        scheme: How it is quantized, or None.
        quantizer: Name of the tensor whose range it uses (its own name, or the head of its tie group), or None.
        source_tensor: See `decision`.
        fixed: Prescribed range, or None.
        reason: Why.
        macs: Multiply-accumulates of its operator for one sample.
        source: `file:line` of the user's code.
        refusal: Which targets cannot compute the operator in integers, and what is legal; None where it is float for
            another reason, or not float.
        computed: Whether the operator that produces it computes in integers (a float operator's output can still be
            quantized for an integer consumer).
    """

    name: str
    role: Role
    kind: str
    decision: Decision
    scheme: Scheme | None = None
    quantizer: str | None = None
    source_tensor: str | None = None
    fixed: tuple[float, float] | None = None
    reason: str = ""
    macs: int = 0
    source: str = ""
    computed: bool = True
    refusal: Refusal | None = None

    @property
    def where(self) -> str:
        """The reason, with the line of the user's code."""
        return f"{self.reason} [{self.source}]" if self.source else self.reason

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the entry."""
        return {
            "name": self.name,
            "role": self.role,
            "kind": self.kind,
            "decision": self.decision,
            "scheme": self.scheme.describe() if self.scheme else None,
            "quantizer": self.quantizer,
            "source_tensor": self.source_tensor,
            "fixed": list(self.fixed) if self.fixed else None,
            "reason": self.reason,
            "macs": self.macs,
            "source": self.source,
            "computed": "integer" if self.computed else "float",
            "refused_by": list(self.refusal.targets) if self.refusal else [],
            "nearest": self.refusal.nearest if self.refusal else "",
        }


@dataclass(frozen=True)
class Constraints:
    """What the target wants of the exported network as a whole.

    Attributes:
        dynamic_batch: Whether the batch size may be left open.
        multiplier_below: Bounds of requantization multipliers by kind of operator; kinds that are absent have none.
        layout: Order of the dimensions of images in the target's artifacts.
        floats: What computes operators that have no integer form.
        quantized_parameters: Kinds of operators whose slopes, factors and offsets are codes too.
        apart: Functions that are written on another shape than the product before them.
    """

    dynamic_batch: bool = True
    multiplier_below: Mapping[str, float] = field(default_factory=dict)
    layout: Layout = "NCHW"
    floats: Floats = "float32"
    quantized_parameters: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The decision for every tensor of a model; prints as a table.

    Attributes:
        target: Name of the target it was made for.
        numerics: Numerics profile of the target.
        entries: Decisions by tensor name, in execution order.
        warnings: Things that the user should know, such as a layer pattern that matches nothing.
        batch_size: The only batch size that the model's code works for; None where it works for all.
        constraints: What the target wants of the exported network as a whole.
    """

    target: str
    numerics: str
    entries: Mapping[str, PlanEntry]
    warnings: tuple[str, ...] = ()
    batch_size: int | None = None
    constraints: Constraints = Constraints()

    def __getitem__(self, name: str) -> PlanEntry:
        return self.entries[name]

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the model for one sample."""
        return sum(e.macs for e in self if e.role != "weight")

    @property
    def integer_macs(self) -> int:
        """Multiply-accumulates that are computed in integers."""
        return sum(e.macs for e in self if e.role != "weight" and e.computed)

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates that is computed in integers, 0 to 1."""
        return self.integer_macs / self.macs if self.macs else 0.0

    def left_float(self) -> tuple[PlanEntry, ...]:
        """Operators that are computed in float."""
        return tuple(e for e in self if e.role == "activation" and not e.computed and e.decision != "constant")

    def forecast(self, entry: PlanEntry) -> Forecast | None:
        """What becomes of the operator of an entry on the target; None for what is no operator of its own.

        An operator without integer form is a float island, or refused where a target has no floats to compute it in.
        """
        if entry.role != "activation" or entry.decision in ("constant", "fused"):
            return None
        if entry.computed:
            return "integer"
        return "refused" if self.constraints.floats == "none" else "float island"

    def tie_groups(self) -> dict[str, tuple[str, ...]]:
        """Tensors that share one range, by the name of the group's head; groups of one are left out."""
        groups: dict[str, list[str]] = {}
        for e in self:
            if e.decision == "integer" and e.quantizer and e.role != "weight":
                groups.setdefault(e.quantizer, []).append(e.name)
        return {head: tuple(names) for head, names in groups.items() if len(names) > 1}

    def summary(self) -> str:
        """Return two or three lines: share of integer multiply-accumulates and what stays float."""
        computed = [e for e in self if e.role == "activation" and e.decision not in ("fused", "constant")]
        integer = sum(e.computed for e in computed)
        size = f"{self.macs / 1e6:.1f} M" if self.macs >= _MILLION else f"{self.macs:,}"
        share = f"{100 * self.integer_share:.2f} % of {size} MACs"
        lines = [f"{self.target}, numerics {self.numerics}: {integer} of {len(computed)} operators integer, {share}"]
        lines += [f"{self._float_label(e)}: {e.name} ({e.kind}): {e.where}" for e in self.left_float()]
        lines += [f"warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def _float_label(self, entry: PlanEntry) -> str:
        return "refused" if self.forecast(entry) == "refused" else "float"

    def __str__(self) -> str:
        header = ("tensor", "operator", "decision", "scheme", "why", "MACs")
        rows = [header]
        rows += [
            (
                e.name,
                e.kind or e.role,
                self._decision(e),
                e.scheme.describe() if e.scheme and e.decision == "integer" else "",
                e.where if e.role == "activation" and not e.computed and e.decision != "constant" else e.reason,
                f"{e.macs:,}" if e.macs and e.role != "weight" else "",
            )
            for e in self
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        return f"{table}\n\n{self.summary()}"

    def _decision(self, entry: PlanEntry) -> str:
        if entry.computed or entry.role != "activation" or entry.decision in ("constant", "fused"):
            return entry.decision
        label = self._float_label(entry)
        return label if entry.decision == "float" else f"{entry.decision} ({label} op)"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of the plan."""
        return {
            "schema": "qat-plan",
            "version": 1,
            "target": self.target,
            "numerics": self.numerics,
            "macs": self.macs,
            "integer_macs": self.integer_macs,
            "batch_size": self.batch_size,
            "constraints": asdict(self.constraints),
            "warnings": list(self.warnings),
            "tensors": [{**e.to_json(), "forecast": self.forecast(e)} for e in self],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan: a table, or JSON where the name ends in `.json`.

        Raises:
            OutputError: The file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1) if str(path).endswith(".json") else str(self)
        atomic_write_text(Path(path), text + "\n")
