"""`qat package`: what a device needs, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qat.cli.options import EncodingsFile, Json, Overrides, Quiet, SkipBad, Source, open_session

Border = Literal["float", "codes"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("package")(package)


def package(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="The package; a folder for each where there are several."),
    ] = Path("package"),
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="NAME", help="Default: those of the recipe.", show_default=False),
    ] = None,
    golden: Annotated[
        int | None, typer.Option("--golden", min=1, help="Golden samples; default: 4.", show_default=False)
    ] = None,
    inputs: Annotated[Border | None, typer.Option("--inputs", help="Default: float.", show_default=False)] = None,
    outputs: Annotated[Border | None, typer.Option("--outputs", help="Default: float.", show_default=False)] = None,
    encodings: EncodingsFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a package in the folder.")] = False,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make the package of each family of devices, execute what is in it in every runtime here, and compare."""
    import json

    from qat.packages.kinds import by_kind, kind_for
    from qat.recipe import stages
    from qat.recipe.schema import PackagesPart

    session = open_session(source, overrides, skip_bad=skip_bad)
    part = session.recipe.export.packages or PackagesPart()
    io = part.io.model_copy(update={k: v for k, v in (("inputs", inputs), ("outputs", outputs)) if v is not None})
    part = part.model_copy(update={"io": io, "golden": golden or part.golden})
    wanted = target or session.recipe.target
    for name in target or ():
        kind_for([name])
    kinds = by_kind(wanted) or {kind_for(wanted): tuple(wanted)}
    places = {names: out if len(kinds) == 1 else out / kind.name for kind, names in kinds.items()}
    made = stages.make_packages(
        session.recipe,
        session.quantized(encodings),
        places,
        session.data.calibration,
        part,
        overwrite=overwrite,
        say=lambda line: None if quiet or as_json else print(line),
    )
    if as_json:
        print(json.dumps([{"folder": str(p.folder), **p.manifest.to_json()} for p in made]))
