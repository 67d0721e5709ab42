"""`qat encodings show|diff|convert`."""

from __future__ import annotations

import enum
import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import Json

_File = Annotated[Path, typer.Argument(metavar="FILE", help="A table of encodings (JSON).", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = typer.Typer(
        help="Show, compare and convert tables of encodings.", no_args_is_help=True, rich_markup_mode=None
    )
    for verb in (show, diff, convert):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="encodings")


def show(
    file: _File,
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Only tensors of such names.")] = "*",
    as_json: Json = False,
) -> None:
    """Print a table of encodings: scale, zero point, observed range, provenance."""
    import json

    from qat.encodings import Encodings
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

    from qat.encodings import Encodings

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


class Format(str, enum.Enum):
    """What a table can be converted to."""

    QAT = "qat"
    AIMET = "aimet"


class AimetVersion(str, enum.Enum):
    """AIMET's formats."""

    V0 = "0.6.1"
    V1 = "1.0.0"
    V2 = "2.0.0"


def convert(
    file: _File,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file to write.", show_default=False)],
    to: Annotated[Format, typer.Option(help="qat reads a file of AIMET's; aimet writes one.")],
    model: Annotated[
        Path | None,
        typer.Option(help="For aimet: the ONNX file that the table is for; what it does not have is left out."),
    ] = None,
    version: Annotated[AimetVersion, typer.Option(help="For aimet: its format.")] = AimetVersion.V1,
    biases: Annotated[bool, typer.Option(help="For aimet: int32 biases too.")] = False,
) -> None:
    """Convert a table of encodings from or to AIMET's format."""
    from qat.encodings import Encodings
    from qat.errors import EncodingError
    from qat.interop.aimet import read_aimet, tensors_of, write_aimet

    if to is Format.QAT:
        read_aimet(file).save(output)
        return
    table = Encodings.load(file)
    if model is None:
        raise EncodingError("AIMET's files tell weights from activations", "name the ONNX file by --model")
    values, parameters = tensors_of(model)
    known = Encodings({name: e for name, e in table.items() if name in values or name in parameters})
    if not known:
        raise EncodingError(f"no tensor of {file} is in {model}", "give the model that the table was made for")
    write_aimet(known, output, parameters=parameters, version=version.value, biases=biases)
    print(f"{len(known)} of {len(table)} tensors are in {model}")
