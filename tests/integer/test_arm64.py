"""The `onnx-arm64` profile: against integers written apart, against vectors of ARM64, and against its ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arm64_cases import additions_and_products, everything_else, fused_floats
from arm64_many import run_on_arm64
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_ort import generator
from torch import nn

import qat
from qat.errors import ExportError
from qat.integer.arm64 import elementwise, floats
from qat.integer.kernels import elementwise as x86
from qat.integer.kernels import layer_norm as x86_norm
from qat.integer.kernels import resize as x86_resize
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.table import hard_swish
from qat.integer.profiles import same_arithmetic
from qat.packages.arm64 import missing_root
from qat.packages.runner import write_plan

#: elements that x86 and ARM64 compute otherwise, as ONNX Runtime 1.31.1 for ARM64 gave them
VECTORS = json.loads((Path(__file__).parent / "arm64_vectors.json").read_text(encoding="utf-8"))


def params(values: list[Any]) -> QParams:
    return QParams(*values)


# -- the fixed-point addition


def away(x: Fraction) -> int:
    """Round to nearest, ties away from zero."""
    size = int(abs(x) + Fraction(1, 2))
    return size if x >= 0 else -size


def exact_addition(qa: int, a: QParams, qb: int, b: QParams, y: QParams) -> int | None:
    """The sum with 22-bit multipliers in exact arithmetic, or None where the kernel computes in float."""
    ratio_a, ratio_b = (Fraction(float(np.float32(q.scale) / np.float32(y.scale))) for q in (a, b))
    largest = max(ratio_a, ratio_b)
    if not (Fraction(1, 2**14) <= min(ratio_a, ratio_b) and largest < 256):
        return None
    shift = next(s for s in range(60) if largest * 2**s >= 2**21)
    factors = [round(ratio * 2**shift) for ratio in (ratio_a, ratio_b)]
    if shift > 31 or max(factors) >= 2**22:
        return None
    total = (qa - a.zero_point) * factors[0] + (qb - b.zero_point) * factors[1]
    assert -(2**31) <= total < 2**31
    return min(max(away(Fraction(total, 2**shift)) + y.zero_point, y.qmin), y.qmax)


scales = st.one_of(st.floats(2.0**-12, 2.0**2), st.integers(-12, 2).map(lambda e: 2.0**e))
qparams = st.builds(QParams, scales, st.integers(0, 255), st.just(0), st.just(255))


@settings(max_examples=100, deadline=None)
@given(qparams, qparams, qparams, st.lists(st.tuples(*[st.integers(0, 255)] * 2), min_size=1, max_size=20))
def test_an_addition_is_exact_in_fixed_point(a: QParams, b: QParams, y: QParams, codes: list[tuple[int, int]]) -> None:
    left, right = torch.tensor(codes).unbind(1)
    found = elementwise.add(left, a, right, b, y).tolist()
    wanted = [exact_addition(qa, a, qb, b, y) for qa, qb in codes]
    if wanted[0] is None:
        # in float: next to the real sum
        real = [(qa - a.zero_point) * a.scale + (qb - b.zero_point) * b.scale for qa, qb in codes]
        for code, value in zip(found, real, strict=True):
            assert abs(code - min(max(value / y.scale + y.zero_point, 0), 255)) <= 0.5 + 1e-3
    else:
        assert found == wanted


def test_ties_go_away_from_zero_and_by_table_alike() -> None:
    q, y = QParams(1.0, 100, 0, 255), QParams(2.0, 50, 0, 255)
    left = torch.tensor([101, 99, 102, 97])
    zero = torch.full_like(left, 100)
    assert elementwise.add(left, q, zero, q, y).tolist() == [51, 49, 51, 48]
    assert x86.add(left, q, zero, q, y).tolist() == [50, 50, 51, 48]
    # enough elements for the table of all pairs
    many = left.repeat(20000)
    assert torch.equal(
        elementwise.add(many, q, zero.repeat(20000), q, y), torch.tensor([51, 49, 51, 48]).repeat(20000).int()
    )


def test_where_an_addition_has_no_multipliers() -> None:
    assert elementwise.add_multipliers(1.0, 0.5) == (1 << 21, 1 << 20, 21)
    assert elementwise.add_multipliers(0.75, 1.5) == (3 << 19, 3 << 20, 21)
    assert elementwise.add_multipliers(255.9, 1.0) is not None
    assert elementwise.add_multipliers(256.0, 1.0) is None
    assert elementwise.add_multipliers(1.0, 2.0**-14) == (1 << 21, 1 << 7, 21)
    assert elementwise.add_multipliers(1.0, 2.0**-15) is None
    # a shift beyond 31, and a multiplier that rounds up to 23 bits
    assert elementwise.add_multipliers(2.0**-10, 2.0**-10) == (1 << 21, 1 << 21, 31)
    assert elementwise.add_multipliers(2.0**-11, 2.0**-11) is None
    assert elementwise.add_multipliers(2.0 - 2.0**-23, 1.0) is None


def test_sixteen_bits_are_added_and_multiplied_in_float() -> None:
    g = generator()
    a, b, y = (QParams(s, 30000, 0, 65535) for s in (0.01, 0.02, 0.03))
    codes = [torch.randint(0, 65536, (500,), generator=g) for _ in range(2)]
    for mine, other in ((elementwise.add, x86.add), (elementwise.mul, x86.mul)):
        assert torch.equal(mine(codes[0], a, codes[1], b, y), other(codes[0], a, codes[1], b, y))


# -- vectors of ARM64


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_elements_that_x86_computes_otherwise(kind: str) -> None:
    mine, other = getattr(elementwise, kind), getattr(x86, kind)
    assert len(VECTORS[kind]) >= 10
    for case in VECTORS[kind]:
        a, b, y = (params(case[key]) for key in "aby")
        # two of each: the runtime swaps the operands where the left one is a single element
        left, right = torch.tensor([case["left"]] * 2), torch.tensor([case["right"]] * 2)
        assert mine(left, a, right, b, y).tolist() == [case["result"]] * 2
        assert other(left, a, right, b, y).tolist() != [case["result"]] * 2


def test_layer_norm_of_arm() -> None:
    for case in VECTORS["layer_norm"]:
        x, y = params(case["x"]), params(case["y"])
        codes, weight, bias = (torch.tensor(case[key]) for key in ("codes", "weight", "bias"))
        assert floats.layer_norm(codes, x, weight, bias, y).tolist() == case["result"]
        assert x86_norm.layer_norm(codes, x, weight, bias, y).tolist() != case["result"]


def test_bilinear_interpolation_of_arm() -> None:
    for case in VECTORS["resize"]:
        x, y, codes = params(case["x"]), params(case["y"]), torch.tensor(case["codes"])
        arguments = (codes, x, y, case["sizes"], case["align_corners"])
        assert floats.resize_bilinear(*arguments).tolist() == case["result"]
        assert x86_resize.resize_bilinear(*arguments).tolist() != case["result"]


def test_hard_swish_of_arm() -> None:
    # as int32: the bits of the floats
    x, wanted = (torch.tensor(VECTORS["hardswish"][key], dtype=torch.int32).view(torch.float32) for key in ("x", "y"))
    assert torch.equal(floats.hard_swish(x), wanted)
    assert not (hard_swish(x) == wanted).any()


def test_squares_are_summed_with_one_rounding_each() -> None:
    values = torch.randn(300, 64, generator=generator()) * 2.0 ** torch.randint(
        -12, 12, (300, 64), generator=generator(1)
    )
    mean, squares = floats._welford(values)
    expected = torch.zeros(64)
    running = torch.zeros(64)
    for count, value in enumerate(values, start=1):
        deviation = value - running
        running = running + deviation / torch.tensor(float(count))
        expected = x86.fma(deviation, value - running, expected)
    assert torch.equal(mean, running)
    assert torch.equal(squares, expected)


# -- the profile


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return y + self.b(y)


class Plain(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))


def prepared(model: nn.Module) -> tuple[qat.PreparedModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    # powers of two: many sums are ties, where the profiles differ
    scheme = {"activations": {"power_of_two": True}}
    qmodel = qat.prepare(model.eval(), x, target=qat.load_target("arm-cpu"), scheme=scheme)
    qat.calibrate(qmodel, [x], progress=False)
    return qmodel, x


def test_converting_to_the_profile(tmp_path: Path) -> None:
    qmodel, x = prepared(Residual())
    imodel, other = qat.convert(qmodel, numerics="onnx-arm64"), qat.convert(qmodel, numerics="onnx")
    assert imodel.program.numerics == "onnx-arm64"
    assert not imodel.native.active
    assert "no kernels of the onnx-arm64 profile" in str(imodel.native)
    name = imodel.program.ops[-1].inputs[0]
    apart = (imodel.run((x,), {name})[name] - other.run((x,), {name})[name]).abs()
    assert apart.max() == 1
    assert (apart > 0).float().mean() < 0.5
    with pytest.raises(ExportError, match="not 'onnx-arm64'"):
        write_plan(imodel, tmp_path)
    with pytest.raises(ExportError, match="unknown numerics profile 'onnx-arm'; use one of onnx, onnx-arm64, tflite"):
        qat.convert(qmodel, numerics="onnx-arm")


def test_programs_that_no_profile_computes_otherwise() -> None:
    plain, x = prepared(Plain())
    simulation = qat.convert(plain, "onnx")
    assert same_arithmetic(simulation.program, "onnx-arm64")
    assert torch.equal(simulation(x), qat.convert(plain, "onnx-arm64")(x))
    assert not same_arithmetic(simulation.program, "tflite")
    assert not same_arithmetic(qat.convert(prepared(Residual())[0], "onnx").program, "onnx-arm64")


# -- ONNX Runtime for ARM64


@pytest.mark.heavy
def test_every_operator_is_onnxruntimes_on_arm64() -> None:
    missing = missing_root()
    if missing is not None:
        pytest.skip(f"missing: {missing.what}; {missing.mend}")
    g = generator()
    cases = [
        *additions_and_products(g, "uint8"),
        *additions_and_products(g, "int8"),
        *fused_floats(g, "uint8"),
        *fused_floats(g, "uint16"),
        *everything_else(g),
    ]
    found = run_on_arm64([case.graph for case in cases])
    apart = Counter[str]()
    for case, (codes,) in zip(cases, found, strict=True):
        apart[case.name] += int((codes != case.expected.long()).sum())
    assert {name: count for name, count in apart.items() if count} == {}
