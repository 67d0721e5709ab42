"""Options that several verbs share, and opening what they work on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat.errors import QatError

if TYPE_CHECKING:
    from qat.recipe.session import Session

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A recipe (YAML) or the folder of a run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as data.batch_size=32.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, and only results.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unreadable images, and count them.")]
EncodingsFile = Annotated[
    Path | None, typer.Option("--encodings", metavar="FILE", help="Use the ranges in this file.", show_default=False)
]


def open_session(source: Path, overrides: list[str] | None, *, skip_bad: bool = False) -> Session:
    """Open a recipe, or the folder of a run with its checkpoints.

    Raises:
        QatError: It is neither, it is not valid, or overrides are given for a run.
    """
    from qat.recipe.folder import RunFolder
    from qat.recipe.load import load_recipe
    from qat.recipe.session import Session

    if source.is_dir():
        run = RunFolder(source)
        recipe = run.recipe()
        if overrides:
            raise QatError(f"{source} is a finished run, its recipe cannot be changed", "override a recipe instead")
        return Session(recipe, skip_bad=skip_bad, run=run)
    return Session(load_recipe(source, overrides or []), skip_bad=skip_bad)
