"""Loading a recipe: YAML, overrides, validation with errors that name the key, variables."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from qat.errors import QatError, RecipeError
from qat.observers import check_observer
from qat.quantizers.registry import make_method
from qat.recipe.overrides import apply_overrides
from qat.recipe.rules import broken_rules
from qat.recipe.schema import Recipe
from qat.recipe.text import parse_yaml
from qat.schemes import make_schemes
from qat.targets import load_target

#: keys whose values are paths; only there ${VAR} and ${VAR:-default} are expanded
PATH_KEYS = ("model.weights", "data.root", "data.labels", "data.train", "data.calibration", "data.test")
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the plain data of a recipe file and apply overrides; nothing is validated yet.

    Raises:
        RecipeError: The file is missing, is not YAML or not a mapping, or an override is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path} ({error.strerror})", "give an existing file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {path} is not UTF-8 text", "give a YAML file") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"the recipe {path} is not a mapping", "see `qat recipe schema`")
    return apply_overrides(data, overrides)


def recipe_problems(data: object) -> list[str]:
    """Return everything that is wrong with the data of a recipe, one line each; empty where it is valid."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        places = [_location(problem) for problem in found]
        # where a value may have one of several forms, pydantic complains once for each
        first = [i for i, place in enumerate(places) if place not in places[:i]]
        return [_describe(found[i], places[i]) for i in first]
    problems = broken_rules(recipe)
    try:
        target = load_target(*recipe.target)
        schemes = make_schemes(recipe.scheme_data(), target.activations, target.weights)
        for scheme in (schemes.activations, *(schemes.activation(rule.pattern) for rule in schemes.layers)):
            check_observer(scheme.observer)
            make_method(scheme, "activation")
        for scheme in (schemes.weights, *(schemes.weight(rule.pattern) for rule in schemes.layers)):
            check_observer(scheme.observer)
            make_method(scheme, "weight")
    except QatError as error:
        problems.append(str(error))
    return problems


def parse_recipe(data: object, source: str = "recipe") -> Recipe:
    """Validate the data of a recipe.

    Raises:
        RecipeError: Something is wrong; the first problem is given with its key, and how many more there are.
    """
    problems = recipe_problems(data)
    if problems:
        more = f" (and {len(problems) - 1} more: qat recipe lint)" if len(problems) > 1 else ""
        raise RecipeError(f"{source}: {problems[0]}{more}")
    return Recipe.model_validate(data)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe; variables stay as they are written.

    Raises:
        RecipeError: The file or an override is wrong, or the recipe is not valid; the key is named.
    """
    return parse_recipe(read_recipe(path, overrides), str(path))


def expand(
    recipe: Recipe,
    environment: Mapping[str, str] | None = None,
    *,
    keep_unset: bool = False,
    part: Literal["model", "data"] | None = None,
) -> Recipe:
    """Return the recipe with ${VAR} and ${VAR:-default} replaced in the values that are paths.

    Args:
        recipe: The recipe.
        environment: Variables; None for the environment of the process.
        keep_unset: Leave a variable that is not set as it is written, instead of stopping.
        part: Only in this part of the recipe; None for everywhere.

    Raises:
        RecipeError: A variable is not set and has no default; it and the key are named.
    """
    values = os.environ if environment is None else environment

    def replace(key: str, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(2)
            # as in a shell, `:-` also stands in for an empty value
            if values.get(name):
                return values[name]
            if default is not None:
                return default
            if keep_unset:
                return match.group(0)
            raise RecipeError(f"{key}: the environment variable {name} is not set", f"export {name}=...")

        return _VARIABLE.sub(value, text)

    data = recipe.to_data()
    for key in PATH_KEYS:
        owner, _, name = key.partition(".")
        if part in (None, owner) and isinstance(data[owner][name], str):
            data[owner][name] = replace(key, data[owner][name])
    return Recipe.model_validate(data)


# -- errors


def _location(problem: Any) -> list[str | int]:
    """Keys and indices that lead to an error, without the marks for the forms of a value."""
    form = re.compile(r"(constrained-int|int|list\[.*\])$")
    return [item for item in problem["loc"] if not (isinstance(item, str) and form.match(item))]


def _describe(problem: Any, location: list[str | int]) -> str:
    """Turn one of pydantic's errors into a line that names the key, the cause and the mend."""
    key, kind, value = _key(location), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        legal = _legal_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), legal, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"legal keys: {', '.join(legal)}"
        return f"unknown key {key}; {mend}"
    if kind == "missing":
        return f"the key {key} is missing; add it"
    if kind == "literal_error":
        choices = problem["ctx"]["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), re.split(r", | or ", choices), n=1)
        return f"{key} is {value!r}; " + (f"did you mean {near[0]!r}?" if near else f"choose from {choices}")
    if kind == "string_pattern_mismatch" and location == ["model", "factory"]:
        return f"{key} is {value!r}; write package.module:callable"
    if kind == "string_pattern_mismatch":
        return f"{key} is {value!r}; use letters, digits, '.', '_' and '-'"
    words = {"model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list"}
    if kind in words:
        return f"{key} is {value!r}; write {words[kind]}"
    wish = (
        problem["msg"].removeprefix("Input should be ").replace("a valid integer", "an integer").replace("valid ", "")
    )
    return f"{key} is {value!r}; it should be {wish}"


def _key(location: Sequence[str | int]) -> str:
    text = ""
    for item in location:
        if isinstance(item, int):
            text += f"[{item}]"
        else:
            part = f"'{item}'" if "." in item else item
            text += f".{part}" if text else part
    return text or "the recipe"


def _legal_keys(location: Sequence[str | int]) -> list[str]:
    part: type[BaseModel] | None = Recipe
    for item in location:
        if part is None:
            return []
        if isinstance(item, str) and item in (keys := _fields(part)):
            part = _part_in(keys[item])
        # an index into a list or a key of a free mapping leads to the part that was found already
    return list(_fields(part)) if part else []


def _fields(part: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info.annotation for name, info in part.model_fields.items()}


def _part_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for item in get_args(annotation) if (found := _part_in(item))), None)
