"""The tables of targets and operators, for the documentation and `qat targets`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.targets.load import load_target, target_names
from qat.targets.rule import OperatorRule
from qat.targets.target import Target, rules


def targets_table() -> str:
    """Return a Markdown table of what each target is as a whole."""
    rows = []
    for target in map(load_target, target_names()):
        batch = "open" if target.dynamic_batch else "static"
        mixed = "" if target.mixed_dtypes else ", one activation type an operator"
        defaults = f"{target.activations.dtype} / {target.weights.dtype} {target.weights.granularity.kind}"
        rest = f"{target.layout}, {batch} batch, numerics {target.numerics}{mixed}"
        rows.append((f"`{target.name}`", target.title, defaults, target.floats, rest, "; ".join(target.sources)))
    return _table(("Name", "Device", "Default activations / weights", "Floats", "Artifact", "Sources"), rows)


def operators_table() -> str:
    """Return a Markdown matrix: for every operator and function, the legal types on every target.

    Targets with the same rules share a column.
    """
    columns: dict[str, list[Target]] = {}
    for target in map(load_target, target_names()):
        columns.setdefault(repr(sorted(target.operators.items(), key=lambda item: item[0])), []).append(target)
    groups = list(columns.values())
    keys = sorted({(kind, name) for group in groups for kind, name, rule in rules(group[0]) if rule.dtypes})
    # a target that does not tell functions apart has the rule of `table` in the row of each
    keys = [key for key in keys if key[1] or not any(k == key[0] and n for k, n in keys)]
    rows = []
    for kind, name in keys:
        cells = [_cell(group[0].rule(kind, name)) for group in groups]
        rows.append((f"`{kind}` {name}" if name else f"`{kind}`", *cells))
    return _table(("Operator", *(", ".join(f"`{t.name}`" for t in group) for group in groups)), rows)


def with_tables(text: str) -> str:
    """Return a page with both tables, up to date, between their markers `<!-- targets -->` and `<!-- /targets -->`.

    Raises:
        ValueError: A marker is missing.
    """
    for name, table in (("targets", targets_table()), ("operators", operators_table())):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin, 1)
        text = before + begin + table + end + rest.split(end, 1)[1]
    return text


def describe(target: Target) -> str:
    """Return a target as text: what it is as a whole, and a line for every rule."""
    lines = [f"{target.name}: {target.title} (version {target.version}), numerics {target.numerics}"]
    lines.append(f"activations {target.activations.describe()}, weights {target.weights.describe()}")
    lines.append(
        f"layout {target.layout}, batch size {'may stay open' if target.dynamic_batch else 'is static'}, "
        f"what is not integer is {'refused' if target.floats == 'none' else target.floats}"
        + ("" if target.mixed_dtypes else ", one activation type an operator")
    )
    lines += [f"source: {source}" for source in target.sources]
    rows = [("operator", "output", "activation/weight types", "weights", "besides")]
    for kind, name, rule in rules(target):
        rows.append((f"{kind} {name}".strip(), _output(rule), ", ".join(pairs(rule)) or "none", *_conditions(rule)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["", *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)]
    return "\n".join(lines)


def to_json(target: Target) -> dict[str, Any]:
    """Return a target as the JSON document of `qat targets NAME --json`."""
    return {
        "name": target.name,
        "title": target.title,
        "version": target.version,
        "numerics": target.numerics,
        "dynamic_batch": target.dynamic_batch,
        "floats": target.floats,
        "layout": target.layout,
        "mixed_dtypes": target.mixed_dtypes,
        "sources": list(target.sources),
        "activations": target.activations.describe(),
        "weights": target.weights.describe(),
        "operators": {
            kind: {
                **_rule_json(rule),
                "functions": None
                if rule.functions is None
                else {name: _rule_json(function) for name, function in rule.functions.items()},
            }
            for kind, rule in target.operators.items()
        },
    }


def _rule_json(rule: OperatorRule) -> dict[str, Any]:
    return {
        "dtypes": pairs(rule),
        "granularity": sorted(rule.granularity),
        "output": rule.output,
        "fixed": {dtype: list(bounds) for dtype, bounds in sorted(rule.fixed.items())},
        "limits": dict(rule.limits),
        "modes": None if rule.modes is None else sorted(rule.modes),
        "symmetric": sorted(rule.symmetric),
        "multiplier_below": rule.multiplier_below,
        "parameters": rule.parameters,
        "apart": rule.apart,
        "instead": rule.instead,
    }


def pairs(rule: OperatorRule) -> list[str]:
    """The legal types of a rule, such as `uint8/int8`, sorted."""
    return sorted("/".join(filter(None, pair)) for pair in rule.dtypes)


def _output(rule: OperatorRule) -> str:
    if not rule.fixed:
        return rule.output
    ranges: dict[tuple[float, float], list[str]] = {}
    for dtype, bounds in sorted(rule.fixed.items()):
        ranges.setdefault(bounds, []).append(dtype)
    return "fixed " + ", ".join(f"{list(bounds)} of {'/'.join(dtypes)}" for bounds, dtypes in ranges.items())


def _conditions(rule: OperatorRule) -> tuple[str, str]:
    weighted = any(weight for _, weight in rule.dtypes)
    notes = [f"{name} <= {limit}" for name, limit in rule.limits.items()]
    notes += [f"mode {'/'.join(sorted(rule.modes))}"] if rule.modes is not None else []
    notes += [f"symmetric {' and '.join(sorted(rule.symmetric))}"] if rule.symmetric else []
    notes += [f"multiplier < {rule.multiplier_below:g}"] if rule.multiplier_below is not None else []
    notes += ["quantized parameters"] if rule.parameters == "quantized" else []
    notes += ["written on another shape behind a product"] if rule.apart else []
    notes += [f"instead: {rule.instead}"] if rule.instead else []
    return ", ".join(sorted(rule.granularity)) if weighted else "", ", ".join(notes)


def _cell(rule: OperatorRule | None) -> str:
    if rule is None or not rule.dtypes:
        return "-"
    by_weight: dict[str, list[str]] = {}
    for pair in sorted(rule.dtypes):
        weight, activation = _short(pair[1]) if pair[1] else "", _short(pair[0])
        by_weight.setdefault(weight, []).append(activation)
    marks = ("T" if rule.granularity == {"per_tensor"} and any(by_weight) else "") + ("F" if rule.fixed else "")
    marks += {"inherit": "I", "tie": "C"}.get(rule.output, "")
    marks += "L" if rule.limits or rule.modes is not None or rule.multiplier_below is not None else ""
    text = "<br>".join(" ".join(acts) + (f" / {weight}" if weight else "") for weight, acts in by_weight.items())
    return f"{text} {marks}".strip()


def _short(dtype: str) -> str:
    return dtype.replace("uint", "u") if dtype.startswith("u") else dtype.replace("int", "s")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, tuple("---" for _ in head), *rows)]
    return "\n".join(lines)
