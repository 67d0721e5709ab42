from __future__ import annotations

from pathlib import Path

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
    unequal,
)
from torch.nn import functional

from qat.errors import PlanError
from qat.integer.kernels.pool import avg_pool, global_avg_pool, max_pool, reduce_mean
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize


def _window(g: torch.Generator, dims: int) -> tuple[list[int], list[int], list[int]]:
    kernel = [random_integer(g, 1, 4) for _ in range(dims)]
    stride = [random_integer(g, 1, 3) for _ in range(dims)]
    return kernel, stride, [random_integer(g, 0, k // 2) for k in (*kernel, *kernel)]


@pytest.mark.parametrize(("dims", "dtype"), [(1, "uint8"), (2, "uint8"), (2, "int8"), (2, "uint16"), (3, "uint8")])
def test_max_pooling_moves_codes(dims: int, dtype: str, tmp_path: Path) -> None:
    g = generator(dims)
    for case in range(24):
        x = random_qparams(g, dtype)
        kernel, stride, padding = _window(g, dims)
        dilation = [random_integer(g, 1, 2) for _ in range(dims)]
        codes = random_codes(g, (2, 3, *[random_integer(g, 7, 11) for _ in range(dims)]), x)

        def build(graph: Graph, name: str, k=kernel, s=stride, p=padding, d=dilation, ceil=case % 2) -> str:
            return graph.op("MaxPool", name, kernel_shape=k, strides=s, pads=p, dilations=d, ceil_mode=ceil)

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], x, dtype, build, path)
        assert ("DequantizeLinear" in operators(path)) == (dtype == "uint16")
        result = max_pool(codes, kernel, stride, padding, dilation, bool(case % 2))
        assert torch.equal(runtime, result.long())


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pooling_is_pytorchs(ceil_mode: bool) -> None:
    g = generator()
    for size in range(5, 12):
        codes = torch.randint(-128, 128, (1, 2, size, size + 1), generator=g)
        expected = functional.max_pool2d(codes.double(), 3, 2, 1, ceil_mode=ceil_mode)
        assert torch.equal(max_pool(codes, 3, 2, 1, 1, ceil_mode).double(), expected)
        assert torch.equal(max_pool(codes, 2).double(), functional.max_pool2d(codes.double(), 2))


@pytest.mark.parametrize(("dims", "dtype"), [(1, "uint8"), (2, "uint8"), (2, "int8"), (2, "uint16"), (3, "uint8")])
def test_average_pooling_is_the_runtimes(dims: int, dtype: str, tmp_path: Path) -> None:
    g = generator(dims)
    for case in range(24):
        x, y = random_qparams(g, dtype), random_qparams(g, dtype)
        if case % 3 == 0:
            y = QParams(x.scale / 2, y.zero_point, y.qmin, y.qmax)
        kernel, stride, padding = _window(g, dims)
        include = bool(case % 2)
        # the runtime's divisor is PyTorch's unless ceil mode meets counted padding
        ceil = bool(case // 2 % 2) and not include
        codes = random_codes(g, (2, 3, *[random_integer(g, 7, 11) for _ in range(dims)]), x)

        def build(graph: Graph, name: str, k=kernel, s=stride, p=padding, c=ceil, i=include) -> str:
            return graph.op(
                "AveragePool", name, kernel_shape=k, strides=s, pads=p, ceil_mode=int(c), count_include_pad=int(i)
            )

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, dtype, build, path)
        assert ("QLinearAveragePool" in operators(path)) == (dtype != "uint16")
        result = avg_pool(codes, x, y, kernel, stride, padding, ceil, include)
        assert torch.equal(runtime, result.long())


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_average_pooling_divides_as_pytorch(include: bool, ceil_mode: bool) -> None:
    g = generator()
    x, y = QParams(2.0**-4, 100, 0, 255), QParams(2.0**-20, 0, -(2**31), 2**31 - 1)
    for size in range(5, 10):
        codes = random_codes(g, (1, 2, size, size + 1), x)
        real = functional.avg_pool2d(dequantize(codes, x), 3, 2, 1, ceil_mode=ceil_mode, count_include_pad=include)
        # within a unit in the last place of float32
        result = avg_pool(codes, x, y, 3, 2, 1, ceil_mode, include)
        assert unequal(result, quantize(real, y))[2] <= 4


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_global_average_pooling_is_qlinearglobalaveragepool(dtype: str, tmp_path: Path) -> None:
    g = generator()
    for case in range(30):
        x, y = random_qparams(g, dtype), random_qparams(g, dtype, -9, -5)
        if case % 3 == 0:
            y = QParams(x.scale / 4, y.zero_point, y.qmin, y.qmax)
        spatial = [random_integer(g, 1, 9) for _ in range(1 + case % 3)]
        codes = random_codes(g, (2, random_integer(g, 1, 20), *spatial), x)
        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, dtype, lambda graph, name: graph.op("GlobalAveragePool", name), path)
        assert operators(path) == ["QLinearGlobalAveragePool"]
        assert torch.equal(runtime, global_avg_pool(codes, x, y).long())


def test_a_mean_over_any_axes_is_a_global_average_pool_of_the_moved_axes(tmp_path: Path) -> None:
    g = generator()
    for case in range(16):
        x, y = random_qparams(g, "uint8"), random_qparams(g, "uint8", -9, -5)
        shape = (2, random_integer(g, 1, 20), random_integer(g, 1, 9), random_integer(g, 1, 30))
        axes = [[2, 3], [1], [3], [0, 2]][case % 4]
        codes, kept = random_codes(g, shape, x), [d for d in range(4) if d not in axes]
        result = reduce_mean(codes, x, y, axes)

        def build(graph: Graph, name: str, x=x, y=y, shape=shape, axes=axes, kept=kept, result=result) -> str:
            def between(value: str, q: QParams) -> str:
                return graph.dequantize(graph.quantize(value, q, "uint8"), q, "uint8")

            count = 1
            for axis in axes:
                count *= shape[axis]
            h = between(graph.op("Transpose", name, perm=kept + axes), x)
            h = between(graph.op("Reshape", h, graph.constant([-1, 1, count], "int64")), x)
            h = between(graph.op("GlobalAveragePool", h), y)
            return graph.op("Reshape", h, graph.constant(list(result.shape), "int64"))

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, "uint8", build, path)
        assert "DequantizeLinear" not in operators(path)
        assert torch.equal(runtime, result.long())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_reducemean_node_is_nearly_the_same(dtype: str) -> None:
    g = generator()
    wrong = total = 0
    for case in range(12):
        x, y = random_qparams(g, dtype), random_qparams(g, dtype, -9, -5)
        axes = [[2, 3], [1], [3], [0, 2]][case % 4]
        codes = random_codes(g, (2, 9, 11, 13), x)

        def build(graph: Graph, name: str, axes=axes) -> str:
            return graph.op("ReduceMean", name, graph.constant(axes, "int64"), keepdims=1)

        runtime = run_qdq([(codes, x)], y, dtype, build)
        count, size, largest = unequal(runtime, reduce_mean(codes, x, y, axes, keepdims=True))
        assert largest <= 1
        wrong, total = wrong + count, total + size
    assert wrong <= 3e-3 * total


def test_windows_of_another_rank_are_refused() -> None:
    codes, q = torch.zeros(1, 1, 4, 4, dtype=torch.int32), QParams(1.0, 0, 0, 255)
    with pytest.raises(PlanError, match="kernel"):
        max_pool(codes, (2, 2, 2))
    with pytest.raises(PlanError, match="padding"):
        max_pool(codes, 2, padding=(1, 1, 1))
    with pytest.raises(PlanError, match="stride"):
        avg_pool(codes, q, q, 2, stride=(1, 1, 1))
