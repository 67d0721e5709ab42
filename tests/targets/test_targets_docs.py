"""docs/targets.md has the tables that the target files give, and a word on every key of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

import qat
from qat.targets import target_names
from qat.targets.parse import _OPTIONAL, _REQUIRED, _RULE_KEYS
from qat.targets.table import describe, operators_table, to_json, with_tables

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")


def test_tables_are_up_to_date() -> None:
    assert with_tables(PAGE) == PAGE, "run scripts/methods_table"


def test_a_table_out_of_date_is_noticed() -> None:
    assert with_tables(PAGE.replace("| `conv` |", "| `konv` |")) == PAGE
    with pytest.raises(ValueError, match="unpack"):
        with_tables("no markers")


@pytest.mark.parametrize("key", sorted({*_REQUIRED, *_OPTIONAL, *_RULE_KEYS}))
def test_every_key_is_explained(key: str) -> None:
    assert f"`{key}`" in PAGE


@pytest.mark.parametrize("name", target_names())
def test_every_target_is_described(name: str) -> None:
    target = qat.load_target(name)
    assert f"\n| `{name}` |" in PAGE
    assert target.sources, "say where the facts come from"
    text, data = describe(target), to_json(target)
    assert all(source in text for source in target.sources)
    for kind, rule in target.operators.items():
        assert f"\n{kind} " in text
        assert data["operators"][kind]["output"] == rule.output
        assert set(data["operators"][kind]["functions"] or ()) == set(rule.functions or ())


def test_the_matrix_says_what_the_rules_say() -> None:
    head, _, *rows = operators_table().splitlines()
    column = next(i for i, cell in enumerate(head.split(" | ")) if "`hexagon-v73`" in cell)
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[column].strip(" |") for row in rows}
    assert cells["`conv`"] == "s8 u16 u8 / s4<br>s8 u16 u8 / s8<br>u16 / s16"
    assert cells["`table` silu"] == "-"
    assert cells["`table` log"] == "s8 u8"
    assert cells["`softmax`"] == "u16 u8 F"
    assert cells["`max_pool`"] == "s8 u16 u8 I"
