"""`qat calibrate`: ranges from data, as a table of encodings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import Json, Overrides, Quiet, SkipBad, Source, open_session


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("calibrate")(calibrate)


def calibrate(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE")] = Path("encodings.json"),
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Default: as the recipe's calibrate stage.", show_default=False),
    ] = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose ranges for the float model from data and write the table of encodings."""
    import json

    from qat.recipe import stages
    from qat.recipe.schema import CalibratePart

    session = open_session(source, overrides, skip_bad=skip_bad)
    given = next((s.calibrate for s in session.recipe.stages if s.calibrate is not None), CalibratePart())
    part = given if images is None else given.model_copy(update={"images": images})
    stages.check_model(session.model, session.data)
    qmodel = stages.prepare(session.recipe, session.model, session.example())
    seen = stages.calibrate(qmodel, session.data.calibration, part, quiet=quiet or as_json)
    encodings = qmodel.encodings()
    encodings.save(out)
    if as_json:
        print(json.dumps(encodings.to_json(), indent=1))
    elif not quiet:
        print(encodings)
        skipped = session.data.skipped.summary()
        print(f"\n{out}: {len(encodings)} encodings from {seen} images" + (f"; {skipped}" if skipped else ""))
