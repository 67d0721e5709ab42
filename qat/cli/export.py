"""`qat export`: a verified ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import EncodingsFile, Json, Overrides, Quiet, SkipBad, Source, open_session


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE")] = Path("model.onnx"),
    encodings: EncodingsFile = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare every quantized tensor.")] = False,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the quantized model as ONNX, execute it in ONNX Runtime and compare it with the simulation."""
    import json

    from qat.recipe import stages
    from qat.recipe.schema import OnnxPart

    session = open_session(source, overrides, skip_bad=skip_bad)
    part = session.recipe.export.onnx or OnnxPart()
    if layers:
        part = part.model_copy(update={"verify": "layers"})
    qmodel = session.quantized(encodings)
    result = stages.export_onnx(session.recipe, qmodel, out, session.data.calibration, part)
    if as_json:
        verification = None if result.verification is None else result.verification.to_json()
        print(
            json.dumps({"path": str(out), "sha256": result.sha256, "opset": result.opset, "verification": verification})
        )
    elif not quiet:
        if layers and result.verification is not None:
            print(result.verification, end="\n\n")
        print(result)
