"""Overrides on the command line: `key.sub=value`."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from qat.errors import RecipeError
from qat.recipe.text import parse_yaml

#: a part of a path: quoted (a layer pattern may hold dots), or up to the next dot
_PART = re.compile(r"""(?:'([^']*)'|"([^"]*)"|([^.'"]+))(?:\.|$)""")


def split_path(path: str) -> list[str]:
    """Split `scheme.layers.'features.0'.weights` into its parts.

    Raises:
        RecipeError: It is empty or malformed.
    """
    parts: list[str] = []
    position = 0
    while position < len(path):
        match = _PART.match(path, position)
        if match is None:
            raise RecipeError(f"malformed key {path!r}", "write key.sub=value, with quotes around parts that hold dots")
        parts.append(next(group for group in match.groups() if group is not None))
        position = match.end()
    if not parts or path.endswith("."):
        raise RecipeError(f"malformed key {path!r}", "write key.sub=value")
    return parts


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe's data with some values replaced.

    A list is entered by index (`stages.1.train.epochs=2`); a list of single-key mappings also by the key of the only
    item that has it (`stages.train.epochs=2`). Missing mappings on the way are made. Values are YAML.

    Raises:
        RecipeError: An override is malformed, or its path does not exist; it is named.
    """
    changed = copy.deepcopy(data)
    for override in overrides:
        path, found, value = override.partition("=")
        if not found:
            raise RecipeError(f"override {override!r} has no '='", "write key.sub=value")
        parts = split_path(path.strip())
        parsed = parse_yaml(value, f"override {override!r}")
        place: Any = changed
        for position, part in enumerate(parts[:-1]):
            place = _enter(place, part, parts[: position + 1], override)
        _assign(place, parts[-1], parsed, override)
    return changed


def _enter(place: Any, part: str, path: list[str], override: str) -> Any:
    if isinstance(place, list):
        index = _index(place, part, override)
        if part.isdigit():
            if isinstance(place[index], str):
                place[index] = {place[index]: {}}
            return place[index]
        if isinstance(place[index], str):
            place[index] = {part: {}}
        if place[index][part] is None:
            place[index][part] = {}
        return place[index][part]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise RecipeError(f"override {override!r}: {'.'.join(path[:-1])} has no keys", "correct the key")


def _assign(place: Any, part: str, value: Any, override: str) -> None:
    if isinstance(place, list):
        index = _index(place, part, override)
        place[index] = value if part.isdigit() else {part: value}
    elif isinstance(place, dict):
        place[part] = value
    else:
        raise RecipeError(f"override {override!r}: nothing can be set there", "correct the key")


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit():
        if int(part) < len(items):
            return int(part)
        raise RecipeError(f"override {override!r}: there are only {len(items)} items", "count from 0")
    found = [i for i, item in enumerate(items) if item == part or (isinstance(item, dict) and part in item)]
    if len(found) == 1:
        return found[0]
    count = "no item" if not found else f"{len(found)} items"
    raise RecipeError(f"override {override!r}: {count} called {part!r}", "give the index, counted from 0")
