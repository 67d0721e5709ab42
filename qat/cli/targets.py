"""`qat targets`: the devices that `qat` knows."""

from __future__ import annotations

from typing import Annotated

import typer

from qat.cli.options import Json


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

    from qat.targets import load_target, target_names
    from qat.targets.table import describe, to_json

    if names:
        target = load_target(*names)
        print(json.dumps(to_json(target), indent=1) if as_json else describe(target))
        return
    known = [load_target(name) for name in target_names()]
    if as_json:
        print(json.dumps([{"name": t.name, "title": t.title, "version": t.version} for t in known], indent=1))
        return
    width = max(len(t.name) for t in known)
    print("\n".join(f"{t.name.ljust(width)}  {t.title} (version {t.version})" for t in known))
