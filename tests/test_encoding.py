"""Encodings: what can be, the warning of the floor, and tables with merge and diff."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from encoding_examples import CHANNELS, GROUPS, MIDDLE, UINT8, encodings, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import numerics
from qat.encoding import Encoding
from qat.encodings import Difference, Encodings
from qat.errors import EncodingError, QuantizationWarning
from qat.scheme import Granularity, ObserverSpec, Scheme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qmin": -1}, r"integer range \[-1, 255\] is empty or outside uint8; use a range within \[0, 255\]"),
        ({"qmin": 9, "qmax": 9}, "is empty or outside"),
        ({"scale": ()}, "0 scales and 1 zero points; give equally many"),
        ({"zero_point": (1, 2)}, "1 scales and 2 zero points"),
        ({"scale": (1.0, 1.0), "zero_point": (0, 0)}, "2 scales for a per-tensor encoding; give exactly one"),
        ({"scale": (0.0,)}, "a scale is not positive and finite in float32"),
        ({"scale": (-1.0,)}, "a scale is not positive"),
        ({"scale": (math.nan,)}, "a scale is not positive"),
        ({"scale": (math.inf,)}, "a scale is not positive"),
        ({"scale": (1e-60,)}, "a scale is not positive and finite in float32"),
        ({"scale": (1e60,)}, "a scale is not positive and finite in float32"),
        ({"zero_point": (256,)}, r"the zero point 256 is outside the integer range \[0, 255\]"),
        ({"qmin": 4}, r"the zero point 3 is outside the integer range \[4, 255\]; choose one inside, so that zero"),
        ({"symmetric": True}, "a symmetric uint8 encoding has a zero point other than 128; make it affine"),
        ({"min": (0.0,)}, "only one of min and max is given"),
        ({"max": (0.0,)}, "only one of min and max is given"),
        ({"min": (0.0, 1.0), "max": (1.0, 2.0)}, "2 minima and 2 maxima for 1 scales"),
        ({"min": (2.0,), "max": (1.0,)}, r"the observed range \[2.0, 1.0\] is inverted or not finite"),
        ({"min": (-math.inf,), "max": (1.0,)}, "inverted or not finite"),
        ({"min": (math.nan,), "max": (1.0,)}, "inverted or not finite"),
        ({"samples": -1}, "the number of samples is -1"),
        ({"provenance": "guessed"}, "unknown provenance 'guessed'; use one of qat, ptq, derived, fixed, imported"),
    ],
)
def test_encodings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    fields = {"dtype": "uint8", "scale": (0.5,), "zero_point": (3,), "qmin": 0, "qmax": 255}
    with pytest.raises(EncodingError, match=message):
        Encoding(**{**fields, **changes})


@given(st.floats(1e-40, 1e38))
def test_scales_are_float32(scale: float) -> None:
    assert Encoding("uint8", (scale,), (0,), 0, 255).scale == (float(np.float32(scale)),)


@given(encodings())
@settings(max_examples=50)
def test_the_tensors_hold_the_numbers(encoding: Encoding) -> None:
    shape = () if encoding.per_tensor else (len(encoding.scale),)
    assert encoding.scale_tensor.shape == encoding.zero_point_tensor.shape == shape
    assert encoding.scale_tensor.dtype == torch.float32
    assert encoding.zero_point_tensor.dtype == torch.int32
    assert tuple(encoding.scale_tensor.reshape(-1).tolist()) == encoding.scale
    assert tuple(encoding.zero_point_tensor.reshape(-1).tolist()) == encoding.zero_point
    for copied in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert copied == encoding
        assert hash(copied) == hash(encoding)


def test_quantize_and_dequantize_use_every_field() -> None:
    x = torch.tensor([[-100.0, 0.3, 100.0], [-100.0, 0.3, 100.0]])
    codes = CHANNELS.quantize(x)
    assert codes.tolist() == [[-127, 1, 127], [-127, 1, 127]]
    assert CHANNELS.dequantize(codes).tolist() == [[-63.5, 0.5, 63.5], [-31.75, 0.25, 31.75]]
    assert CHANNELS.representable() == (-63.5, 63.5)
    assert UINT8.quantize(torch.tensor([0.25, 0.75])).tolist() == [3, 5]
    assert UINT8.quantize(torch.tensor([0.25, 0.75]), "half_away").tolist() == [4, 5]
    assert UINT8.representable() == (-1.5, 126.0)


def test_from_range_is_range_to_scale() -> None:
    scheme = Scheme("int8", granularity=Granularity("per_channel", 1), observer=ObserverSpec("mse"), qmin=-100)
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 2.0])
    scale, zero_point = numerics.range_to_scale(low, high, scheme)
    encoding = Encoding.from_range(low, high, scheme, provenance="qat", samples=7, name="conv.weight")
    assert encoding == Encoding(
        "int8", tuple(scale.tolist()), tuple(zero_point.tolist()), -100, 127, False, scheme.granularity,
        (-1.0, 0.5), (1.0, 2.0), "qat", "mse", 7,
    )  # fmt: skip
    assert Encoding.from_range(low, high, scheme, method="by hand").method == "by hand"
    assert Encoding.from_range(-1.0, 1, Scheme()).provenance == "ptq"


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (math.nan, 1.0, "the observed range is not finite"),
        (0.0, math.inf, "the observed range is not finite"),
        (2.0, 1.0, "the observed range is empty"),
        (torch.zeros(2), torch.ones(3), "2 minima and 3 maxima"),
        (torch.zeros(2), torch.ones(2), "2 scales for a per-tensor encoding"),
        (torch.zeros(0), torch.zeros(0), "0 scales"),
    ],
)
def test_from_range_names_the_tensor(low: Any, high: Any, message: str) -> None:
    with pytest.raises(EncodingError, match=f"^'features.0': {message}"):
        Encoding.from_range(low, high, Scheme(), name="features.0")
    with pytest.raises(EncodingError, match=f"^{message}"):
        Encoding.from_range(low, high, Scheme())


def test_the_floor_is_warned_of_with_the_name() -> None:
    with pytest.warns(
        QuantizationWarning, match="^'relu' is all zero, or next to it; its scale is set to the floor"
    ) as caught:
        Encoding.from_range(0.0, 0.0, Scheme(), name="relu")
    assert caught[0].filename == __file__
    with pytest.warns(QuantizationWarning, match="'relu' is all zero"):
        Encoding.from_range(-1e-20, 1e-20, Scheme(), name="relu")
    per_channel = Scheme("int8", symmetric=True, granularity=Granularity("per_channel"))
    with pytest.warns(QuantizationWarning, match=r"'w' is all zero in 2 of 3 channels"):
        Encoding.from_range(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 1e-30]), per_channel, name="w")


def test_no_warning_without_cause_or_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoding.from_range(5.0, 5.0, Scheme(), name="constant")
        Encoding.from_range(0.0, 1e-6, Scheme(), name="small")
        assert Encoding.from_range(0.0, 0.0, Scheme()).scale == (numerics.SCALE_FLOOR,)


def test_derived_encodings_keep_the_grid() -> None:
    inherited = CHANNELS.derived("reshape")
    assert (inherited.provenance, inherited.method) == ("derived", "reshape")
    assert inherited.same_grid(CHANNELS)
    assert inherited != CHANNELS
    for changes in ({"scale": (0.5, 0.125)}, {"granularity": Granularity("per_channel", 1)}):
        assert not CHANNELS.same_grid(Encoding(**{**CHANNELS.__dict__, **changes}))


def test_a_table_is_a_mapping() -> None:
    table = Encodings({"a": UINT8, "b": CHANNELS})
    assert list(table) == ["a", "b"]
    assert table["b"] is CHANNELS
    assert table == Encodings({"b": CHANNELS, "a": UINT8}, {"model": "x"})
    assert table != Encodings({"a": UINT8})
    assert repr(table) == "Encodings(2 tensors)"
    with pytest.raises(KeyError):
        table["c"]


def test_printing_a_table() -> None:
    lines = str(Encodings({"a": UINT8, "conv.weight": CHANNELS})).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["a", "uint8", "0.5", "3"], ["conv.weight", "int8", "0.5..", "(2)"],
    ]  # fmt: skip
    assert lines[2].endswith("[-2, 63.5]  qat   lsq")
    assert len(str(Encodings()).splitlines()) == 1


def entry(provenance: Any, method: str) -> Encoding:
    return Encoding("uint8", (1.0,), (0,), 0, 255, provenance=provenance, method=method)


@pytest.mark.parametrize(
    ("prefer", "mine", "theirs", "winner"),
    [
        ("self", "ptq", "qat", "mine"),
        ("other", "qat", "ptq", "theirs"),
        ("qat", "ptq", "qat", "theirs"),
        ("qat", "qat", "ptq", "mine"),
        ("qat", "qat", "qat", "mine"),
        ("qat", "ptq", "fixed", "mine"),
        ("ptq", "qat", "ptq", "theirs"),
        ("ptq", "derived", "imported", "mine"),
    ],
)
def test_merging(prefer: Any, mine: str, theirs: str, winner: str) -> None:
    left = Encodings({"only left": entry("fixed", "l"), "both": entry(mine, "mine")}, {"model": "a", "left": "1"})
    right = Encodings({"both": entry(theirs, "theirs"), "only right": entry("ptq", "r")}, {"model": "b", "right": "2"})
    merged = left.merge(right, prefer=prefer)
    assert list(merged) == ["only left", "both", "only right"]
    assert merged["both"].method == winner
    assert merged["both"].provenance == (mine if winner == "mine" else theirs)
    assert (merged["only left"].provenance, merged["only right"].provenance) == ("fixed", "ptq")
    assert merged.meta == {"model": "a", "left": "1", "right": "2"}
    assert left["both"].method == "mine"  # untouched


@given(tables, tables)
def test_merging_takes_every_entry_from_one_of_both(left: Encodings, right: Encodings) -> None:
    assert left.merge(left) == left
    assert left.merge(Encodings()) == left
    assert left.merge(right, "other") == right.merge(left, "self")
    for prefer in ("self", "other", "qat", "ptq"):
        merged = left.merge(right, prefer)
        assert set(merged) == set(left) | set(right)
        assert all(e in (left.get(name), right.get(name)) for name, e in merged.items())


def test_merging_by_something_else() -> None:
    with pytest.raises(EncodingError, match="cannot prefer 'best'; choose self, other, qat or ptq"):
        Encodings().merge(Encodings(), prefer="best")  # type: ignore[arg-type]


def changed(encoding: Encoding, **changes: Any) -> Encoding:
    return Encoding(**{**encoding.__dict__, **changes})


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (UINT8, None, "a: only in the first"),
        (None, UINT8, "a: only in the second"),
        (UINT8, changed(UINT8, scale=(0.55,)), "a: scale 0.5 -> 0.55 (by 10 %)"),
        (UINT8, changed(UINT8, zero_point=(65,)), "a: zero point 3 -> 65"),
        (UINT8, changed(UINT8, qmax=250), "a: range [0, 255] -> [0, 250]"),
        (UINT8, changed(UINT8, provenance="qat", method="lsq"), "a: provenance ptq -> qat, method  -> lsq"),
        (UINT8, changed(UINT8, dtype="uint16"), "a: dtype uint8 -> uint16"),
        (UINT8, changed(UINT8, samples=5), "a: observed range or sample count"),
        (changed(MIDDLE, symmetric=False), MIDDLE, "a: symmetric False -> True"),
        (CHANNELS, changed(CHANNELS, scale=(0.5, 0.5)), "a: scale[1] 0.25 -> 0.5 (by 100 %)"),
        (CHANNELS, changed(CHANNELS, granularity=Granularity("per_channel", 1)),
         "a: granularity per_channel(0) -> per_channel(1)"),
        (GROUPS, changed(GROUPS, granularity=Granularity("per_group", -1, 16)),
         "a: granularity per_group(-1, 32) -> per_group(-1, 16)"),
        (GROUPS, changed(GROUPS, zero_point=(-8, 6)), "a: zero point[1] 7 -> 6"),
        (changed(UINT8, zero_point=(0,)), changed(GROUPS, dtype="uint8", zero_point=(0, 0), qmin=0, qmax=255),
         "a: 1 -> 2 scales, granularity per_tensor -> per_group(-1, 32), provenance ptq -> imported"),
    ],
)  # fmt: skip
def test_differences_are_described(left: Encoding | None, right: Encoding | None, words: str) -> None:
    assert Difference("a", left, right).describe() == words


def test_the_difference_of_tables() -> None:
    other = changed(UINT8, samples=1)
    left = Encodings({"same": UINT8, "changed": UINT8, "left": UINT8})
    right = Encodings({"right": CHANNELS, "changed": other, "same": UINT8})
    assert left.diff(right) == (
        Difference("changed", UINT8, other), Difference("left", UINT8, None), Difference("right", None, CHANNELS),
    )  # fmt: skip
    assert left.diff(left) == ()


@pytest.mark.parametrize("meta", [{"epochs": 3}, {3: "epochs"}, {"a": None}])
def test_meta_is_text(meta: Any) -> None:
    with pytest.raises(EncodingError, match=r"meta entry .* of a table of encodings is not a string"):
        Encodings({}, meta)
