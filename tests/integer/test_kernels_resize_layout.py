from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from kernels_ort import (
    DTYPES,
    Graph,
    generator,
    operators,
    random_codes,
    random_integer,
    random_qparams,
    run_qdq,
)
from torch.nn import functional

from qat.errors import PlanError
from qat.integer.kernels.layout import concat, pad
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.resize import resize_bilinear, resize_nearest


def test_nearest_positions_are_pytorchs() -> None:
    g = generator()
    for case in range(60):
        codes = torch.randint(0, 256, (1, 2, random_integer(g, 1, 40), random_integer(g, 1, 40)), generator=g)
        if case % 3 == 0:
            scales = [1 + random_integer(g, 0, 40) / 16, 1 + random_integer(g, 0, 40) / 10]
            expected = functional.interpolate(codes.float(), scale_factor=scales, mode="nearest")
            result = resize_nearest(codes, expected.shape[2:], scales)
        else:
            sizes = [random_integer(g, 1, 80), random_integer(g, 1, 80)]
            expected = functional.interpolate(codes.float(), size=sizes, mode="nearest")
            result = resize_nearest(codes, sizes)
        assert torch.equal(result.float(), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_nearest_of_whole_factors_runs_on_codes(dtype: str, tmp_path: Path) -> None:
    g = generator()
    for factor in (2, 3, 4):
        x = random_qparams(g, dtype)
        codes = random_codes(g, (2, 3, 7, 9), x)

        def build(graph: Graph, name: str, factor: int = factor) -> str:
            scales = graph.constant([1, 1, factor, factor], "float32")
            return graph.op(
                "Resize", name, "", scales, mode="nearest", nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )  # fmt: skip

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], x, dtype, build, path)
        assert operators(path) == ["Resize"]
        result = resize_nearest(codes, (7 * factor, 9 * factor), (float(factor), float(factor)))
        assert torch.equal(runtime, result.long())


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_is_the_runtimes(dtype: str, align_corners: bool) -> None:
    g = generator()
    for case in range(20):
        x = random_qparams(g, dtype)
        y = x if case % 2 else random_qparams(g, dtype)
        codes = random_codes(g, (2, 3, random_integer(g, 1, 20), random_integer(g, 1, 20)), x)
        sizes = [random_integer(g, 1, 40), random_integer(g, 1, 40)]
        scales = None
        if case % 4 == 0:
            sizes, scales = [codes.shape[2] * 2, codes.shape[3] * 3], (2.0, 3.0)

        def build(graph: Graph, name: str, sizes=sizes, scales=scales) -> str:
            mode = "align_corners" if align_corners else "half_pixel"
            if scales is None:
                operands = ["", "", graph.constant([2, 3, *sizes], "int64")]
            else:
                operands = ["", graph.constant([1, 1, *scales], "float32")]
            return graph.op("Resize", name, *operands, mode="linear", coordinate_transformation_mode=mode)

        runtime = run_qdq([(codes, x)], y, dtype, build)
        assert torch.equal(runtime, resize_bilinear(codes, x, y, sizes, align_corners, scales).long())


def test_sizes_of_another_rank_are_refused() -> None:
    q = QParams(1.0, 0, 0, 255)
    with pytest.raises(PlanError, match="output sizes"):
        resize_nearest(torch.zeros(1, 1, 2, 2), (4,))
    with pytest.raises(PlanError, match="scales"):
        resize_nearest(torch.zeros(1, 1, 2, 2), (4, 4), (2.0,))
    with pytest.raises(PlanError, match="bilinear"):
        resize_bilinear(torch.zeros(1, 1, 2), q, q, (4,))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_padding_keeps_the_codes(dtype: str, mode: Literal["constant", "reflect", "replicate"]) -> None:
    onnx_mode = "edge" if mode == "replicate" else mode
    g = generator()
    for case in range(6):
        x = random_qparams(g, dtype)
        codes = random_codes(g, (2, 3, 6, 7), x)
        sides = [random_integer(g, 0, 3) for _ in range(4)]
        value = [0.0, 0.37, -100.0][case % 3]

        def build(graph: Graph, name: str, s=sides, value=value) -> str:
            pads = graph.constant([0, 0, s[2], s[0], 0, 0, s[3], s[1]], "int64")
            fill = [graph.constant(value, "float32")] if onnx_mode == "constant" else []
            return graph.op("Pad", name, pads, *fill, mode=onnx_mode)

        runtime = run_qdq([(codes, x)], x, dtype, build)
        assert torch.equal(runtime, pad(codes, x, sides, mode, value).long())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_concatenation_requantizes_only_what_differs(dtype: str, tmp_path: Path) -> None:
    g = generator()
    for case in range(10):
        encodings = [random_qparams(g, dtype) for _ in range(3)]
        y = encodings[1] if case % 2 else random_qparams(g, dtype)
        parts = [(random_codes(g, (2, random_integer(g, 1, 5), 4, 5), q), q) for q in encodings]
        path = str(tmp_path / "model.onnx")
        runtime = run_qdq(parts, y, dtype, lambda graph, *names: graph.op("Concat", *names, axis=1), path)
        assert ("QLinearConcat" in operators(path)) == ("16" not in dtype)
        assert torch.equal(runtime, concat(parts, y, 1).long())


def test_a_concat_of_one_keeps_two_encodings_apart(tmp_path: Path) -> None:
    """ONNX Runtime replaces QuantizeLinear-DequantizeLinear twice in a row by one pair with another encoding."""
    g = generator()
    x, y = QParams(0.03, 3, 0, 255), QParams(0.05, 100, 0, 255)
    codes = random_codes(g, (2, 3, 40), x)

    def build(graph: Graph, name: str) -> str:
        h = graph.dequantize(graph.quantize(graph.op("Transpose", name, perm=[0, 2, 1]), x, "uint8"), x, "uint8")
        h = graph.dequantize(graph.quantize(graph.op("Concat", h, axis=0), y, "uint8"), y, "uint8")
        return graph.op("Transpose", h, perm=[0, 2, 1])

    path = str(tmp_path / "model.onnx")
    runtime = run_qdq([(codes, x)], y, "uint8", build, path)
    assert operators(path).count("QLinearConcat") == 1
    assert torch.equal(runtime, concat([(codes, x)], y, 0).long())
