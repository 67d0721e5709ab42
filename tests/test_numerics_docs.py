"""docs/numerics.md states what the code does: types, profiles, constants, and the example of the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from encoding_examples import CHANNELS

from qat import numerics
from qat.encodings import Encodings
from qat.scheme import INT_TYPES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_integer_types() -> None:
    stated = re.findall(r"(u?int\d+)(?: \(biases\))? \| (-?\d+) \.\.\. (\d+)", PAGE)
    assert {name: (int(low), int(high)) for name, low, high in stated} == {
        name: (kind.qmin, kind.qmax) for name, kind in INT_TYPES.items()
    }


@pytest.mark.parametrize("profile", [numerics.ONNX, numerics.ONNX_ARM64, numerics.TFLITE])
def test_profiles(profile: numerics.NumericsProfile) -> None:
    assert f"| `{profile.name}` | {profile.rounding} | {profile.requantize} |" in PAGE


def test_constants() -> None:
    assert numerics.SCALE_FLOOR == 2.0**-40
    assert numerics.RANGE_LIMIT == 2.0**126
    assert "low, high = max(min(low, 0), -2**126), min(max(high, 0), 2**126)" in PAGE
    assert "scale = min(max(scale, 2**-40), 2**127 / (qmax - qmin))" in PAGE


def test_the_example_is_a_table_of_encodings() -> None:
    example = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    table = Encodings.from_json(json.loads(example[1]))
    assert table == Encodings({"conv.weight": CHANNELS})
    assert table.meta == {"model": "m"}
