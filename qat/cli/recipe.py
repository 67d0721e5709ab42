"""`qat recipe lint|schema|show`."""

from __future__ import annotations

from typing import Annotated

import typer

from qat.cli.options import Json, Overrides, RecipeFile


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = typer.Typer(help="Check and show recipes.", no_args_is_help=True, rich_markup_mode=None)
    for verb in (lint, schema, show):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="recipe")


def lint(
    recipe: RecipeFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also make the model, open the data and plan the quantization.")
    ] = False,
) -> None:
    """Check a recipe and print every problem; status 2 where there is one."""
    from qat.errors import RecipeError
    from qat.recipe import stages
    from qat.recipe.load import parse_recipe, read_recipe, recipe_problems
    from qat.recipe.session import Session

    data = read_recipe(recipe, overrides or [])
    problems = recipe_problems(data)
    for problem in problems[:-1]:
        print(f"{recipe}: {problem}")
    if problems:
        raise RecipeError(f"{recipe}: {problems[-1]}")
    if deep:
        session = Session(parse_recipe(data, str(recipe)))
        stages.check_model(session.model, session.data)
        print(session.plan().summary())
    print(f"{recipe}: valid")


def schema() -> None:
    """Print the JSON Schema of recipes."""
    import json

    from qat.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))


def show(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the recipe with every default, override and variable put in (variables that are not set stay)."""
    import json

    from qat.recipe.load import expand, load_recipe
    from qat.recipe.text import dump_yaml

    data = expand(load_recipe(recipe, overrides or []), keep_unset=True).to_data()
    print(json.dumps(data, indent=1) if as_json else dump_yaml(data), end="\n" if as_json else "")
