"""YAML in and out: the safe loader, without its two traps, and a stable writer."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from qat.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice, and reads `1e-4` as the number that it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML: plain data only, no key twice.

    Raises:
        RecipeError: It is not such YAML; `source`, line and cause are named.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = source if mark is None else f"{source}, line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mend = "correct it"
        lines = text.splitlines()
        if mark is not None and any("${" in line for line in lines[max(0, mark.line - 1) : mark.line + 1]):
            mend = 'put values that have ${...} inside { } in quotes: root: "${VAR}/folder"'
        raise RecipeError(f"{place}: {problem}", mend) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: {error}", "correct it") from None


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe writer with short lists of numbers on one line and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the dumper's signature
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flat = all(isinstance(item, int | float | str) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(list, _represent_list)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the order given."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
