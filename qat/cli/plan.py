"""`qat plan`: what becomes integer, what stays float, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import Json, Overrides, Source, open_session


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plan")(plan)


def plan(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write it: a table, or JSON for *.json.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME",
            help="Plan for this target (given again: for all of them at once), whatever the recipe says.",
            show_default=False,
        ),
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Only the summary.")] = False,
    as_json: Json = False,
) -> None:
    """Show what of the model becomes integer on the target, what is a float island or refused, and why."""
    made = open_session(source, overrides).plan(target)
    if out is not None:
        made.save(out)
    if as_json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        print(made.summary() if summary else made)
