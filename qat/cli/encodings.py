"""`qat encodings show|diff`."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import Json

_File = Annotated[Path, typer.Argument(metavar="FILE", help="A table of encodings (JSON).", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = typer.Typer(help="Show and compare tables of encodings.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (show, diff):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="encodings")


def show(
    file: _File,
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Only tensors of such names.")] = "*",
    as_json: Json = False,
) -> None:
    """Print a table of encodings: scale, zero point, observed range, provenance."""
    import json

    from qat.encoding import Encodings
    from qat.errors import EncodingError

    table = Encodings.load(file)
    chosen = Encodings({k: e for k, e in table.items() if fnmatch.fnmatchcase(k, pattern)}, table.meta)
    if not chosen and pattern != "*":
        raise EncodingError(f"no tensor of {file} matches {pattern!r}", "use a shell-style pattern")
    print(json.dumps(chosen.to_json(), indent=1) if as_json else chosen)


def diff(
    left: _File,
    right: _File,
    as_json: Json = False,
) -> None:
    """Print the tensors in which two tables differ; status 1 where there are any."""
    import json

    from qat.encoding import Encodings

    found = Encodings.load(left).diff(Encodings.load(right))
    if as_json:
        rows = [
            {
                "name": d.name,
                "left": d.left.to_json() if d.left else None,
                "right": d.right.to_json() if d.right else None,
            }
            for d in found
        ]
        print(json.dumps(rows, indent=1))
    else:
        for difference in found:
            print(difference.describe())
    if found:
        raise typer.Exit(1)
