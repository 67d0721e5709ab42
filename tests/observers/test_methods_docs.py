"""docs/methods.md has the tables that the code gives, and says something of every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.observers import ALIASES, OBSERVERS
from qat.observers.table import with_tables

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_tables_are_up_to_date():
    assert with_tables(PAGE) == PAGE, "run scripts/methods_table"


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_every_method_is_described(name):
    assert f"\n**`{name}`**" in PAGE
    assert OBSERVERS[name].about
    assert OBSERVERS[name].source
    assert all(option.about for option in OBSERVERS[name].OPTIONS.values())


def test_every_alias_is_in_the_table():
    assert all(f"\n| `{name}` |" in PAGE for name in ALIASES)


def test_a_table_out_of_date_is_noticed():
    assert with_tables(PAGE.replace("| `minmax` |", "| `min_max` |", 1)) == PAGE
    with pytest.raises(ValueError, match="unpack"):
        with_tables("no markers")
