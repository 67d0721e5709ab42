"""`qat verify`: execute an exported file, or a package, again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat.cli.options import EncodingsFile, Json, Overrides, Quiet, SkipBad, Source, open_session

MANIFEST = "manifest.json"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("verify")(verify)


def verify(
    source: Source,
    overrides: Overrides = None,
    onnx: Annotated[
        Path | None,
        typer.Option("--onnx", metavar="FILE", help="Default: model.onnx of the run.", show_default=False),
    ] = None,
    encodings: EncodingsFile = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, show_default=False)] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare every quantized tensor.")] = False,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="Of a package: status 1 where a runtime is missing, too.")
    ] = False,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Execute an exported file in ONNX Runtime and compare it with the simulation; status 1 where they differ.

    SOURCE may be a package: its files are checked, and executed in every runtime that is here.
    """
    import json

    if (source / MANIFEST).is_file():
        _verify_package(source, require_all=require_all, quiet=quiet, as_json=as_json)
        return

    from qat.errors import QatError
    from qat.recipe import stages
    from qat.recipe.folder import ONNX
    from qat.recipe.schema import OnnxPart

    session = open_session(source, overrides, skip_bad=skip_bad)
    file = onnx or (session.run.path / ONNX if session.run is not None else None)
    if file is None:
        raise QatError("a recipe names no exported file", "give --onnx FILE, or the folder of a run")
    part = session.recipe.export.onnx or OnnxPart()
    if samples is not None:
        part = part.model_copy(update={"samples": samples})
    verification, outputs = stages.verify_onnx(
        session.quantized(encodings), file, session.data.calibration, part, "layers" if layers else "outputs"
    )
    if as_json:
        print(json.dumps({"path": str(file), **verification.to_json()}))
    elif not quiet:
        print(verification)
    stages.require_equal(verification, outputs, file, part)
    if not (quiet or as_json):
        print(f"\n{stages.verified_line(verification)}")


def _verify_package(folder: Path, *, require_all: bool, quiet: bool, as_json: bool) -> None:
    import json

    from qat.errors import VerificationError
    from qat.packages.verify import verify_package

    found = verify_package(folder)
    if as_json:
        checks = [check.to_json() for check in found.manifest.checks]
        print(json.dumps({"standing": found.standing, "tampered": list(found.tampered), "checks": checks}))
    elif not quiet:
        print(found)
    if found.tampered:
        raise VerificationError(f"{folder}: {found.tampered[0]}", "make the package again")
    if found.standing == "failed":
        raise VerificationError(f"{folder} does not compute what it promises", "see the lines above")
    if require_all and found.standing != "verified":
        raise VerificationError(f"{folder} is {found.standing}", "install what is missing, see the lines above")
