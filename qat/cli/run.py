"""`qat run`: do what a recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qat.cli.interrupt import noted_interrupts
from qat.cli.options import Json, Overrides, Quiet, RecipeFile, SkipBad


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run")(run)


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do what a recipe says: train, calibrate, train quantized, export, verify, check its contract.

    In several processes: torchrun --nproc-per-node N -m qat run RECIPE; data.batch_size is that of all together.
    """
    from qat.recipe.load import load_recipe
    from qat.recipe.run import run_recipe
    from qat.train.processes import place_by_environment

    loaded = load_recipe(recipe, overrides or [])
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    with noted_interrupts() as check:

        def say(line: str) -> None:
            check()
            if not (quiet or as_json):
                print(line)

        result = run_recipe(
            loaded,
            out,
            resume=resume,
            overwrite=overwrite,
            skip_bad=skip_bad,
            quiet=quiet or as_json,
            say=say,
            show=_silent if as_json else print,
        )
    if as_json and place_by_environment().rank == 0:
        print(json.dumps({"folder": str(result.folder), **result.state.to_json()}, indent=1))


def _silent(line: str) -> None:
    """Print nothing."""
