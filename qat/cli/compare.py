"""`qat compare`: the quantized model beside the float one, tensor by tensor."""

from __future__ import annotations

from typing import Annotated

import typer

from qat.cli.options import EncodingsFile, Json, Overrides, Quiet, SkipBad, Source, open_session


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compare")(compare)


def compare(
    source: Source,
    overrides: Overrides = None,
    encodings: EncodingsFile = None,
    images: Annotated[int, typer.Option("--images", min=1)] = 256,
    worst: Annotated[
        int | None, typer.Option("--worst", min=1, help="Only the tensors with the lowest SQNR.", show_default=False)
    ] = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare the quantized model with the float one on test images: error by tensor, saturation, agreement."""
    import dataclasses
    import json

    import qat

    session = open_session(source, overrides, skip_bad=skip_bad)
    split = session.data.test or session.data.calibration
    report = qat.compare(
        session.model,
        session.quantized(encodings),
        split.images(images),
        progress=False if quiet or as_json else None,
    )
    if worst is not None:
        report = dataclasses.replace(report, tensors=report.worst(worst))
    print(json.dumps(report.to_json(), indent=1) if as_json else report)
