"""The codes behind the inputs and outputs of a plan, and the conversions that applications make."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import Plan, PlanWriter, RunnerError, Session, library
from runtime_networks import A, B, X, chain

from qat import native
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")

TYPES = {"u8": (1, torch.uint8), "s8": (2, torch.int8), "u16": (3, torch.uint16), "s16": (4, torch.int16)}


class Info(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("qmax", ctypes.c_int32),
    ]


def info(kind: str, q: QParams) -> Info:
    return Info(b"x", TYPES[kind][0], 0, (ctypes.c_int64 * 8)(), q.scale, q.zero_point, q.qmin, q.qmax)


def test_float_borders_have_the_codes_that_they_become() -> None:
    plan = Plan(chain())
    found = plan.border("input_codes", 0)
    # the sizes are those of the floats: the codes lie in another order
    assert (found["name"], found["type"], found["sizes"]) == ("image", "u8", [-1, 3, 9, 11])
    assert found["grid"] == pytest.approx((X.scale, X.zero_point, X.qmin, X.qmax))
    found = plan.border("output_codes", 0)
    assert (found["name"], found["type"], found["sizes"]) == ("result", "s8", [-1, 10])


def test_codes_are_their_own() -> None:
    w = PlanWriter()
    w.tensor("x", "u8", [2, 3], A)
    w.tensor("y", "u8", [3, 2], A)
    w.op("reshape", ["x"], "y")
    plan = Plan(w.to_bytes(["x"], ["y"]))
    for side in ("input", "output"):
        assert plan.border(f"{side}_codes", 0) == plan.border(side, 0)


@pytest.mark.parametrize(
    ("second", "words"),
    [("quantize", "'x': has several grids"), ("reshape", "'x': is computed with in floats"), ("", "no operator")],
)
def test_floats_without_codes(second: str, words: str) -> None:
    w = PlanWriter()
    w.tensor("x", "f32", [2, 3])
    outputs = []
    if second:
        w.tensor("a", "u8", [2, 3], A)
        w.op("quantize", ["x"], "a", [0, 1])
        w.tensor("b", "u8" if second == "quantize" else "f32", [2, 3], B if second == "quantize" else None)
        w.op(second, ["x"], "b", [0, 1] if second == "quantize" else [])
        outputs = ["a", "b"]
    plan = Plan(w.to_bytes(["x"], outputs))
    with pytest.raises(RunnerError, match=f"QAT_INVALID_ARGUMENT: tensor .*{words}.*; use floats"):
        plan.border("input_codes", 0)
    with pytest.raises(RunnerError, match="index: the plan has not so many"):
        plan.border("input_codes", 1)


@given(
    st.sampled_from(sorted(TYPES)),
    st.floats(2.0**-13, 8.0, width=32),
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.data(),
)
def test_conversions_are_those_of_the_simulation(
    kind: str, scale: float, values: list[float], data: st.DataObject
) -> None:
    low, high = (0, 255) if kind[0] == "u" else (-128, 127)
    if kind.endswith("16"):
        low, high = low * 256, high * 256 + 255
    qmin = data.draw(st.integers(low, high))
    qmax = data.draw(st.integers(qmin, high))
    q = QParams(scale, data.draw(st.integers(qmin, qmax)), qmin, qmax)
    lib, grid, x = library(), info(kind, q), torch.tensor(values)
    codes, back = torch.empty(len(values), dtype=TYPES[kind][1]), torch.empty(len(values))
    arguments = (ctypes.byref(grid), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(values)))
    assert lib.qat_quantize(*arguments, ctypes.c_void_p(codes.data_ptr())) == 0
    expected = quantize(x, q)
    assert codes.tolist() == expected.tolist()
    arguments = (ctypes.byref(grid), ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(len(values)))
    assert lib.qat_dequantize(*arguments, ctypes.c_void_p(back.data_ptr())) == 0
    assert torch.equal(back, dequantize(expected, q))
    # what a caller that gives codes to a float plan relies on
    assert torch.equal(quantize(back, q), expected)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("u8", {"scale": 0.0}), ("u8", {"scale": float("nan")}), ("u8", {"zero_point": 256}), ("u8", {"qmin": 256}),
     ("s8", {"qmax": 255}), ("s8", {"qmin": 5, "qmax": 4})],
)  # fmt: skip
def test_grids_that_make_no_sense(kind: str, changes: dict[str, float]) -> None:
    lib, grid = library(), info(kind, QParams(1.0, 0, 0, 100))
    for field, value in changes.items():
        setattr(grid, field, value)
    values = (ctypes.c_float * 1)(1.0)
    assert lib.qat_quantize(ctypes.byref(grid), values, ctypes.c_int64(1), values) == 1
    assert b"info: has no codes with a grid; give what" in lib.qat_last_error()
    assert lib.qat_dequantize(None, values, ctypes.c_int64(1), values) == 1
    assert b"is null or negative" in lib.qat_last_error()
    good = info("u8", A)
    assert lib.qat_quantize(ctypes.byref(good), None, ctypes.c_int64(1), values) == 1
    assert b"values: is null" in lib.qat_last_error()
    good.type = 6
    assert lib.qat_quantize(ctypes.byref(good), values, ctypes.c_int64(1), values) == 1


def test_a_session_tells_its_instruction_set() -> None:
    plan, lib = Plan(chain()), library()
    lib.qat_session_isa.restype = ctypes.c_char_p
    assert lib.qat_session_isa(Session(plan, 1, isa="portable").handle) == b"portable"
    assert lib.qat_session_isa(Session(plan, 1).handle) == lib.qat_find_isa(None)
    # unchecked, or the best
    assert lib.qat_session_isa(Session(plan, 1, isa="portable", flags=2).handle) == b"portable"
    with pytest.raises(RunnerError, match="isa 'neon9': the library has no such instruction set"):
        Session(plan, 1, isa="neon9", flags=2)
