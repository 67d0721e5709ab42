"""`qat targets`: the devices that `qat` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.cli.options import Json

if TYPE_CHECKING:
    from qat.targets import Target


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("targets")(targets)


def targets(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Show this target, or the intersection of several.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the targets, or show what one (or the intersection of several) can execute in integers."""
    import json

    from qat.targets import load_target
    from qat.targets.load import target_names

    if names:
        target = load_target(*names)
        print(json.dumps(_to_json(target), indent=1) if as_json else _table(target))
        return
    known = [load_target(name) for name in target_names()]
    if as_json:
        print(json.dumps([{"name": t.name, "title": t.title, "version": t.version} for t in known], indent=1))
        return
    width = max(len(t.name) for t in known)
    print("\n".join(f"{t.name.ljust(width)}  {t.title} (version {t.version})" for t in known))


def _pairs(pairs: frozenset[tuple[str, str]]) -> list[str]:
    return sorted("/".join(filter(None, pair)) for pair in pairs)


def _to_json(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "title": target.title,
        "version": target.version,
        "numerics": target.numerics,
        "dynamic_batch": target.dynamic_batch,
        "activations": target.activations.describe(),
        "weights": target.weights.describe(),
        "operators": {
            kind: {
                "dtypes": _pairs(rule.dtypes),
                "granularity": sorted(rule.granularity),
                "output": rule.output,
                "fixed": None if rule.fixed is None else list(rule.fixed),
            }
            for kind, rule in target.operators.items()
        },
    }


def _table(target: Target) -> str:
    rows = [("operator", "output", "activation/weight types")]
    for kind, rule in target.operators.items():
        output = rule.output if rule.fixed is None else f"fixed {list(rule.fixed)}"
        rows.append((kind, output, ", ".join(_pairs(rule.dtypes))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{target.name}: {target.title} (version {target.version}), numerics {target.numerics}"]
    lines += [f"activations {target.activations.describe()}, weights {target.weights.describe()}", ""]
    lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
