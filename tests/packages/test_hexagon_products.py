"""Products of two activations on the HTP: the rule, the check that uses it, and the rule against the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from qat.errors import VerificationError
from qat.export import htp
from qat.export.onnx import model_bytes
from qat.export.runtime import session
from qat.packages import hexagon_runtimes
from qat.packages.hexagon_products import product_codes, signed_columns

Codes = dict[str, np.ndarray[Any, Any]]
TYPES = {
    np.dtype(name): kind
    for name, kind in (("uint8", TensorProto.UINT8), ("int8", TensorProto.INT8), ("uint16", TensorProto.UINT16))
}


def product(feeds: Codes, zeros: tuple[int, int, int], scale: float, *, constant: bool = False) -> onnx.ModelProto:
    """`codes = a @ b` as QDQ, the scales of a and b 0.5, that of the result `0.25 / scale`."""
    kind = feeds["a"].dtype
    shape = np.matmul(feeds["a"].astype(np.float32), feeds["b"].astype(np.float32)).shape
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "half", "za"], ["af"]),
        helper.make_node("DequantizeLinear", ["b", "half", "zb"], ["bf"]),
        helper.make_node("MatMul", ["af", "bf"], ["of"]),
        helper.make_node("QuantizeLinear", ["of", "so", "zo"], ["codes"]),
    ]
    held = {"half": np.float32(0.5), "so": np.float32(0.25 / scale), "b": feeds["b"]}
    held |= {name: np.asarray(value, kind) for name, value in zip(("za", "zb", "zo"), zeros, strict=True)}
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info(n, TYPES[kind], x.shape) for n, x in feeds.items() if n == "a" or not constant],
        [helper.make_tensor_value_info("codes", TYPES[kind], shape)],
        [numpy_helper.from_array(np.asarray(x), n) for n, x in held.items() if n != "b" or constant],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def drawn(seed: int, kind: type = np.uint8) -> tuple[Codes, tuple[int, int, int], float]:
    """A random product whose results lie well in their range: codes, zero points, and the multiplier."""
    rng = np.random.default_rng(seed)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    k = int(rng.choice([2, 8, 64, 197]))
    za, zb = (
        int(rng.integers(low, high + 1)),
        int(rng.choice([low, high, (low + high + 1) // 2, rng.integers(low, high + 1)])),
    )
    made = {"a": rng.integers(low, high + 1, (1, 2, 20, k)), "b": rng.integers(low, high + 1, (1, 2, k, 30))}
    if seed % 2:  # no box: near the zero point with tails, as activations are
        tails = {n: rng.standard_normal(x.shape) * 30 for n, x in made.items()}
        made = {"a": np.rint(za + tails["a"]), "b": np.rint(zb + tails["b"])}
    feeds: Codes = {n: np.clip(x, low, high).astype(kind) for n, x in made.items()}
    sums = total(feeds, za, zb)
    scale = float(rng.choice([30, 60])) / max(float(sums.std()), 1.0)
    return feeds, (za, zb, int(np.clip((low + high) / 2 - sums.mean() * scale, low, high))), scale


def total(feeds: Codes, za: int, zb: int) -> np.ndarray[Any, Any]:
    sums: np.ndarray[Any, Any] = (feeds["a"].astype(np.float64) - za) @ (feeds["b"].astype(np.float64) - zb)
    return sums


def apart(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


# -- the rule


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.integers(-255, 255)))
def test_columns_become_signed_codes(x: np.ndarray[Any, Any]) -> None:
    rounded = signed_columns(x)
    axis = -2 if x.ndim > 1 else -1
    step = np.maximum(1, np.maximum(x.max(axis, keepdims=True) / 127, -x.min(axis, keepdims=True) / 128))
    assert rounded.shape == x.shape
    assert np.all(np.abs(rounded - x) <= step / 2 + 1e-9)
    codes = rounded / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-9)
    assert np.rint(codes).min() >= -128
    assert np.rint(codes).max() <= 127


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int64, (4, 5), elements=st.integers(-128, 127)))
def test_signed_columns_stay(x: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(signed_columns(x), x)


def test_columns_are_scaled_one_by_one() -> None:
    x = np.array([[254, 100], [3, 3]])
    # 254 is 127 steps of 2; 3 is one and a half of them, rounded up
    np.testing.assert_array_equal(signed_columns(x), [[254, 100], [4, 3]])
    np.testing.assert_array_equal(signed_columns(np.array([-256, 3, -3])), [-256, 4, -2])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_codes_of_a_product(seed: int, constant: bool) -> None:
    feeds, (za, zb, zo), scale = drawn(seed)
    model = product(feeds, (za, zb, zo), scale, constant=constant)
    codes = product_codes(model, {n: x for n, x in feeds.items() if n == "a" or not constant})
    sums = (feeds["a"].astype(np.float64) - za) @ signed_columns(feeds["b"].astype(np.float64) - zb)
    expected = np.clip(sums * scale + zo, 0, 255)
    assert codes is not None
    # half a code, and what float32 makes of a tie
    assert np.abs(codes - expected).max() <= 0.5 + 1e-3


def test_a_second_factor_in_the_middle_is_exact() -> None:
    feeds, (za, _, zo), scale = drawn(3)
    model = product(feeds, (za, 128, zo), scale)
    np.testing.assert_array_equal(product_codes(model, feeds), session(model_bytes(model)).run(None, feeds)[0])


@pytest.mark.parametrize("kind", [np.int8, np.uint16])
def test_other_types_have_no_such_rule(kind: type) -> None:
    feeds, zeros, scale = drawn(1, kind)
    assert product_codes(product(feeds, zeros, scale), feeds) is None


def test_other_operators_have_no_such_rule() -> None:
    feeds, zeros, scale = drawn(1)
    feeds["b"] = feeds["a"]
    model = product(feeds | {"b": feeds["a"].swapaxes(-1, -2)}, zeros, scale)
    model.graph.node[2].op_type = "Add"
    assert product_codes(model, feeds) is None


# -- the check


Change = Callable[[onnx.ModelProto], object]


def halved(model: onnx.ModelProto) -> None:
    set_value(model, "so", lambda x: x / np.float32(2))


def shifted(model: onnx.ModelProto) -> None:
    set_value(model, "zb", lambda x: x + np.uint8(3))


def swapped(model: onnx.ModelProto) -> None:
    a, b = model.graph.node[2].input
    model.graph.node[2].input[:] = [b, a]


def set_value(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(tensor))), name))


class Device:
    """An HTP that obeys the rule, but for what `change` does to the model, and `off` codes."""

    def __init__(self, model: onnx.ModelProto, off: int) -> None:
        self.model, self.off = model, off

    def run(self, names: object, feeds: Mapping[str, Any]) -> list[Any]:
        codes = product_codes(self.model, feeds)
        assert codes is not None
        return [np.clip(codes.astype(np.int64) + self.off, 0, 255).astype(np.uint8)]


def check(
    monkeypatch: pytest.MonkeyPatch, folder: Path, feeds: Codes, zeros: tuple[int, int, int], scale: float,
    change: Change | None = None, off: int = 0,
) -> str:  # fmt: skip
    @contextmanager
    def opened(model: bytes, arch: int, *, graph: bool) -> Iterator[Any]:
        changed = onnx.load_from_string(model)
        if change is not None:
            change(changed)
        yield SimpleNamespace(session=Device(changed, off))

    monkeypatch.setattr(htp, "htp_session", opened)
    onnx.save(product(feeds, zeros, scale), str(folder / "m.onnx"))
    return hexagon_runtimes.check_operators(folder / "m.onnx", feeds, 73)


#: square, so that its factors can change places; a second factor far from signed codes
SQUARE: Codes = {
    name: np.random.default_rng(seed).integers(0, 256, (1, 1, 24, 24)).astype(np.uint8)
    for seed, name in enumerate("ab")
}
ZEROS, SCALE = (120, 10, 100), 60 / float(total(SQUARE, 120, 10).std())


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_check_knows_the_rule(off: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = check(monkeypatch, tmp_path, SQUARE, ZEROS, SCALE, off=off)
    assert said.startswith("each of 1 operators alone: at most ")
    assert said.endswith("% equal; of 1 products of activations, HTP rounds the second factor")


@pytest.mark.parametrize(("change", "off"), [(halved, 0), (shifted, 0), (swapped, 0), (None, 2), (None, -2)])
def test_the_check_finds_a_wrong_product(
    change: Change | None, off: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = r"HTP v73 is \d+ codes off in 'codes' alone, its second factor rounded as HTP does, where 1 may be"
    with pytest.raises(VerificationError, match=message):
        check(monkeypatch, tmp_path, SQUARE, ZEROS, SCALE, change, off)


# -- on the emulator


def emulated(model: onnx.ModelProto, feeds: Codes, arch: int) -> Any:
    with htp.htp_session(model_bytes(model), arch, graph=False) as opened:
        return opened.session.run(None, feeds)[0]


@pytest.mark.heavy
@pytest.mark.skipif(not htp.available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("arch", [68, 73, 79])
def test_the_rule_on_the_emulator(arch: int) -> None:
    for seed in range(8):
        feeds, zeros, scale = drawn(seed)
        model = product(feeds, zeros, scale)
        assert apart(emulated(model, feeds, arch), product_codes(model, feeds)) <= 1, f"seed {seed}"


@pytest.mark.heavy
@pytest.mark.skipif(not htp.available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("arch", [68, 73])
def test_small_codes_beside_a_large_one_double(arch: int) -> None:
    feeds = {n: x.copy() for n, x in drawn(0)[0].items()}
    feeds["a"] = np.clip(feeds["a"], 50, 250)
    # the large code takes part in no sum, but sets the step of its column to 2: 1 is rounded up to it
    feeds["a"][..., 0], feeds["b"][..., 0, :], feeds["b"][..., 1:, :] = 50, 254, 1
    scale = 100 / float(total(feeds, 50, 0).max())
    model = product(feeds, (50, 0, 0), scale)
    codes = emulated(model, feeds, arch)
    assert apart(codes, product_codes(model, feeds)) <= 1
    assert apart(codes, session(model_bytes(model)).run(None, feeds)[0]) > 90


@pytest.mark.heavy
@pytest.mark.skipif(not htp.available(), reason="onnxruntime-qnn is not installed")
def test_int8_is_multiplied_as_it_is() -> None:
    for seed in range(4):
        feeds, zeros, scale = drawn(seed, np.int8)
        model = product(feeds, zeros, scale)
        assert apart(emulated(model, feeds, 73), session(model_bytes(model)).run(None, feeds)[0]) <= 1
