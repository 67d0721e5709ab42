"""`qat export`: a verified ONNX or TFLite file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qat.cli.options import EncodingsFile, Json, Overrides, Quiet, SkipBad, Source, open_session

if TYPE_CHECKING:
    from qat.export.tflite.verify import TfliteResult
    from qat.export.verify import ExportResult


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: model.onnx or model.tflite.", show_default=False),
    ] = None,
    file_format: Annotated[
        Literal["onnx", "tflite"] | None,
        typer.Option("--format", help="Default: by the file's ending, else onnx.", show_default=False),
    ] = None,
    encodings: EncodingsFile = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare every quantized tensor.")] = False,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the quantized model as ONNX or TFLite, execute it in the runtime and compare it with the simulation."""
    import json

    from qat.recipe import stages
    from qat.recipe.schema import OnnxPart, TflitePart

    session = open_session(source, overrides, skip_bad=skip_bad)
    tflite = file_format == "tflite" or (file_format is None and out is not None and out.suffix == ".tflite")
    path = out or Path("model.tflite" if tflite else "model.onnx")
    chosen = {"verify": "layers"} if layers else {}
    recipe, split = session.recipe, session.data.calibration
    qmodel = session.quantized(encodings)
    result: ExportResult | TfliteResult
    if tflite:
        tflite_part = (recipe.export.tflite or TflitePart()).model_copy(update=chosen)
        result = stages.export_tflite(recipe, qmodel, path, split, tflite_part)
        details: dict[str, Any] = {
            "io": tflite_part.io.model_dump(),
            "default_kernels": None if result.default is None else result.default.to_json(),
        }
    else:
        part = (recipe.export.onnx or OnnxPart()).model_copy(update=chosen)
        result = stages.export_onnx(recipe, qmodel, path, split, part)
        details = {"opset": result.opset}
    if as_json:
        verification = None if result.verification is None else result.verification.to_json()
        print(json.dumps({"path": str(path), "sha256": result.sha256, **details, "verification": verification}))
    elif not quiet:
        if layers and result.verification is not None:
            print(result.verification, end="\n\n")
        print(result)
