"""docs/quantizers.md has the table that the code gives, and says something of every quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.quantizers import QUANTIZERS
from qat.quantizers.table import with_table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quantizers.md").read_text(encoding="utf-8")


def test_the_table_is_up_to_date() -> None:
    assert with_table(PAGE) == PAGE, "run scripts/methods_table"
    assert with_table(PAGE.replace("| `lsq` |", "| `LSQ` |", 1)) == PAGE
    with pytest.raises(ValueError, match="unpack"):
        with_table("no markers")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_is_described(name: str) -> None:
    assert f"\n**`{name}`** " in PAGE
    assert QUANTIZERS[name].about
    assert QUANTIZERS[name].source
    assert all(option.about for option in QUANTIZERS[name].OPTIONS.values())
