"""The tables of observers and of names of other systems, for the documentation."""

from __future__ import annotations

from collections.abc import Iterable

from qat.observers.aliases import ALIASES
from qat.observers.options import Option
from qat.observers.registry import OBSERVERS


def observers_table() -> str:
    """Return a Markdown table of every observer: name, options with defaults, range and source."""
    rows = [
        (f"`{name}`", "<br>".join(_option(key, o) for key, o in kind.OPTIONS.items()) or "-", kind.about, kind.source)
        for name, kind in OBSERVERS.items()
    ]
    return _table(("Name", "Options (default)", "Range", "Source"), rows)


def aliases_table() -> str:
    """Return a Markdown table of the names of other systems: what each stands for."""
    rows = []
    for name, alias in ALIASES.items():
        meaning = [f"`{alias.observer}`"] if name != alias.observer else []
        meaning += [f"{key} {value}" for key, value in alias.values.items()]
        options = [f"`{theirs}` is `{own}`" for theirs, own in alias.renames.items()]
        options += [f"`{theirs}` N is `{own}` 2^N" for theirs, own in alias.powers.items()]
        options += [f"`{theirs}` [a, b] is `{a}` a, `{b}` b" for theirs, (a, b) in alias.pairs.items()]
        rows.append((f"`{name}`", ", ".join(meaning) or "itself", "<br>".join(options) or "-", alias.about))
    return _table(("Name", "Stands for", "Options by their names", "Whose"), rows)


def with_tables(text: str) -> str:
    """Return a page with both tables, up to date, between their markers `<!-- observers -->` and `<!-- /observers -->`.

    Raises:
        ValueError: A marker is missing.
    """
    for name, table in (("observers", observers_table()), ("aliases", aliases_table())):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin, 1)
        text = before + begin + table + end + rest.split(end, 1)[1]
    return text


def _option(key: str, option: Option) -> str:
    default = "chosen" if option.default is None else str(option.default).lower()
    return f"`{key}` ({default}): {option.about}; {option.describe()}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, tuple("---" for _ in head), *rows)]
    return "\n".join(lines)
