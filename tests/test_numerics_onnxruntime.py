"""quantize and dequantize against ONNX Runtime's QuantizeLinear and DequantizeLinear (opset 21, CPU)."""

from __future__ import annotations

import math

import numerics_reference as reference
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qat import numerics
from qat.encoding import Encoding
from qat.scheme import INT_TYPES, Granularity, Scheme

PER_TENSOR = Granularity()


def attributes(granularity: Granularity) -> dict[str, int]:
    if granularity.kind == "per_tensor":
        return {}
    return {"axis": granularity.axis} | ({} if granularity.size is None else {"block_size": granularity.size})


def onnx_runtime(
    x: Tensor, scale: Tensor, zero_point: Tensor, dtype: str, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """Codes and dequantized values. The codes come through a second DequantizeLinear: 4-bit outputs cannot be read."""
    element = getattr(TensorProto, dtype.upper())
    shape = list(scale.shape)
    attrs = attributes(granularity)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attrs),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["real"], **attrs),
            helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["codes"]),
        ],
        "oracle",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in ("real", "codes")],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, shape, scale.flatten().tolist()),
            helper.make_tensor("zero_point", element, shape, zero_point.flatten().tolist()),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("zero", element, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    # as written: no fusion, no folding
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    real, codes = session.run(["real", "codes"], {"x": x.numpy()})
    return torch.from_numpy(codes).to(torch.int32), torch.from_numpy(real)


def hard_values(scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Ties of every code (of a sample for 16 bits) and their neighbours, nasty values, random ones that saturate."""
    codes = torch.arange(qmin - 2, qmax + 2)
    if codes.numel() > 5000:
        codes = torch.cat([codes[:1000], codes[torch.randint(0, codes.numel(), (3000,))], codes[-1000:]])
    ties = ((codes - zero_point).double() + 0.5).mul(scale).float()
    span = (qmax - qmin) * scale
    return torch.cat(
        [
            ties,
            torch.nextafter(ties, torch.tensor(math.inf)),
            torch.nextafter(ties, torch.tensor(-math.inf)),
            torch.tensor(reference.NASTY),
            (torch.rand(1000) * 3 - 1.5) * min(span, 1e37),
        ]
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, and zeros of the same sign."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0235294, 1 / 3, 2.0**-40, 1e-30, 1e30, 2.0**-149])
@pytest.mark.parametrize("where", ["lowest", "inside", "highest"])
def test_per_tensor(dtype: str, scale: float, where: str) -> None:
    kind = INT_TYPES[dtype]
    place = {"lowest": kind.qmin, "inside": kind.qmin + 5, "highest": kind.qmax}[where]
    s, z = torch.tensor(scale), torch.tensor(place, dtype=torch.int32)
    x = hard_values(float(s), place, kind.qmin, kind.qmax)
    codes, real = onnx_runtime(x, s, z, dtype, PER_TENSOR)
    ours = numerics.quantize(x, s, z, kind.qmin, kind.qmax)
    assert torch.equal(ours, codes)
    assert same_bits(numerics.dequantize(ours, s, z), real)


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel(dtype: str, axis: int) -> None:
    kind, x = INT_TYPES[dtype], torch.randn(3, 4, 7) * 3
    granularity = Granularity("per_channel", axis)
    scale = torch.rand(x.shape[axis]) + 0.01
    zero_point = torch.randint(kind.qmin, kind.qmax + 1, scale.shape, dtype=torch.int32)
    codes, real = onnx_runtime(x, scale, zero_point, dtype, granularity)
    ours = numerics.quantize(x, scale, zero_point, kind.qmin, kind.qmax, granularity)
    assert torch.equal(ours, codes)
    assert same_bits(numerics.dequantize(ours, scale, zero_point, granularity), real)


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@pytest.mark.parametrize(("axis", "size"), [(0, 2), (1, 4), (1, 16), (2, 3), (-1, 5)])
def test_per_group_with_a_shorter_last_group(dtype: str, axis: int, size: int) -> None:
    kind, x = INT_TYPES[dtype], torch.randn(5, 16, 7) * 3
    granularity = Granularity("per_group", axis, size)
    shape = list(x.shape)
    shape[axis] = -(-shape[axis] // size)
    scale = torch.rand(shape) + 0.01
    zero_point = torch.randint(kind.qmin, kind.qmax + 1, shape, dtype=torch.int32)
    codes, real = onnx_runtime(x, scale, zero_point, dtype, granularity)
    # one flat list, row-major, as an encoding has them
    ours = numerics.quantize(x, scale.flatten(), zero_point.flatten(), kind.qmin, kind.qmax, granularity)
    assert torch.equal(ours, codes)
    assert same_bits(numerics.dequantize(ours, scale.flatten(), zero_point.flatten(), granularity), real)


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_encodings_of_observed_ranges(dtype: str, symmetric: bool) -> None:
    x = torch.cat([torch.randn(2000) * 5, torch.tensor([0.0, -30.0, 30.0])])
    encoding = Encoding.from_range(-17.3, 11.9, Scheme(dtype=dtype, symmetric=symmetric))
    codes, real = onnx_runtime(x, encoding.scale_tensor, encoding.zero_point_tensor, dtype, PER_TENSOR)
    assert torch.equal(encoding.quantize(x), codes)
    assert same_bits(encoding.dequantize(codes), real)


def test_int32_biases_are_dequantized_alike() -> None:
    codes = torch.tensor([0, 1, -1, 2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    scale = torch.tensor(3.7e-5)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["q", "scale"], ["real"])],
        "bias",
        [helper.make_tensor_value_info("q", TensorProto.INT32, [codes.numel()])],
        [helper.make_tensor_value_info("real", TensorProto.FLOAT, [codes.numel()])],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [float(scale)])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (real,) = session.run(None, {"q": codes.numpy().astype(np.int32)})
    assert torch.equal(numerics.dequantize(codes, scale, torch.tensor(0)), torch.from_numpy(real))
