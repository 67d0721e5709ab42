"""The exported model as a whole: names, borders, batch, types, determinism, fusion in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_programs import B, Builder, bias, enc, execute, integer, residual_network, samples, single, weight

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.emitters.types import integer_tensor
from qat.export.onnx import emitters, model_bytes, program_to_onnx
from qat.export.runtime import session, session_entries
from qat.export.verify import verify_onnx
from qat.integer.program import Constant, Op, Program, TensorInfo

KINDS = """conv conv_transpose linear matmul add sub mul div clamp table prelu softmax layer_norm max_pool avg_pool
mean resize pad concat reshape transpose slice expand rescale identity quantize dequantize requantize island"""


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def optimized(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Operators of the graph that ONNX Runtime really executes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(folder / "optimized.onnx"))


def values(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in (*node.input, *node.output)}


def test_every_canonical_kind_has_an_emitter() -> None:
    assert set(emitters()) == set(KINDS.split())


def test_names_are_the_users() -> None:
    model = program_to_onnx(residual_network())
    assert [v.name for v in model.graph.input] == ["x"]
    assert [v.name for v in model.graph.output] == ["classifier"]
    names = values(model)
    assert {"features.1.add", "features.1.add/codes", "features.1.add/dequantized"} <= names
    assert {"features.0.weight", "features.0.weight/codes", "classifier/raw", "classifier/codes"} <= names
    nodes = [node.name for node in model.graph.node]
    assert len(set(nodes)) == len(nodes)
    constants = {t.name: t for t in model.graph.initializer}
    assert constants["features.0.weight/codes"].data_type == onnx.TensorProto.INT8
    assert constants["features.0.bias/codes"].data_type == onnx.TensorProto.INT32
    assert constants["features.0.weight/scale"].dims == [8]


def test_the_runtime_fuses_everything_to_integer_operators(tmp_path: Path) -> None:
    ops = optimized(program_to_onnx(residual_network()), tmp_path)
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == 1
    assert ops.count("QLinearConv") == 2
    assert {"QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= set(ops)
    assert not {"Conv", "Gemm", "Add", "MaxPool", "GlobalAveragePool"} & set(ops)


def test_a_linear_on_tokens_is_fused_to_an_integer_gemm(tmp_path: Path) -> None:
    w, x = weight("w", torch.randn(4, 6)), enc()
    assert w.encoding is not None
    program = single("linear", (B, 5, 6), (B, 5, 4), x, enc(), (w, bias("b", torch.randn(4), x, w.encoding)))
    ops = optimized(program_to_onnx(program), tmp_path)
    assert "QGemm" in ops
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == 1


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_network_with_a_shortcut_gives_every_code_of_the_integer_model(dtype: str, weights: str) -> None:
    program = residual_network(dtype, weights)
    result = verify_onnx(program_to_onnx(program), program, samples(program, batch=8), integer, level="layers")
    assert result.worst.max_difference == 0, str(result)


def test_four_bit_weights_are_stored_in_four_bits_and_fused_in_eight(tmp_path: Path) -> None:
    program = residual_network(weight_dtype="int4")
    model = program_to_onnx(program)
    (codes,) = [t for t in model.graph.initializer if t.name == "features.0.weight/codes"]
    assert codes.data_type == onnx.TensorProto.INT4
    assert len(codes.raw_data) == 8 * 3 * 3 * 3 / 2
    assert {"QLinearConv", "QGemm"} <= set(optimized(model, tmp_path))
    direct = program_to_onnx(program, four_bit_weights="direct")
    assert "Cast" not in kinds(direct)
    readers = [n for n in direct.graph.node if "features.0.weight/codes" in n.input]
    assert [n.op_type for n in readers] == ["DequantizeLinear"]
    assert verify_onnx(direct, program, samples(program), integer).ok(1)
    with pytest.raises(ExportError, match="unknown spelling 'packed' of 4-bit weights"):
        program_to_onnx(program, four_bit_weights="packed")  # type: ignore[arg-type]


def test_the_session_entries_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, flags, expected in (
        ("aarch64", {}, {}),
        ("x86_64", {"avx512_vnni": True}, {"session.qdqisint8allowed": "1"}),
        ("AMD64", {"avx_vnni": True}, {"session.qdqisint8allowed": "1"}),
        ("x86_64", {"avx2": True}, {"session.x64quantprecision": "1"}),
    ):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert session_entries() == expected


def test_layers_as_outputs_leave_the_fusion_as_it_is(tmp_path: Path) -> None:
    model = program_to_onnx(residual_network())
    plain = set(optimized(model, tmp_path))
    for node in list(model.graph.node):
        if node.op_type == "QuantizeLinear":
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None))
    probed = set(optimized(model, tmp_path))
    assert {op for op in probed if op.startswith("Q")} == {op for op in plain if op.startswith("Q")}
    assert not {"Conv", "Gemm", "Add"} & probed


def test_the_same_program_gives_the_same_bytes_and_says_what_made_it() -> None:
    first, second = (program_to_onnx(residual_network(), metadata={"encodings": "digest"}) for _ in range(2))
    assert model_bytes(first) == model_bytes(second)
    properties = {p.key: p.value for p in first.metadata_props}
    assert properties["qat.numerics"] == "onnx"
    assert properties["encodings"] == "digest"
    assert first.producer_name == "qat"
    assert properties["qat.version"] == first.producer_version


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_opsets(opset: int) -> None:
    program = residual_network()
    model = program_to_onnx(program, opset=opset)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert verify_onnx(model, program, samples(program), execute, level="layers").worst.max_difference == 0


def test_opset_21_needs_no_newer_file_format_than_onnx_runtime_1_18_reads() -> None:
    assert program_to_onnx(residual_network()).ir_version == 10


@pytest.mark.parametrize("opset", [17, 20, 30])
def test_an_unsupported_opset_is_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset}.*use 21 to 23"):
        program_to_onnx(residual_network(), opset=opset)


def test_the_batch_is_open_or_fixed() -> None:
    program = residual_network()
    opened, fixed = program_to_onnx(program), program_to_onnx(program, dynamic_batch=False, batch_size=2)
    assert opened.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    runtime = session(model_bytes(opened))
    for batch in (1, 5):
        assert runtime.run(None, {"x": np.zeros((batch, 3, 12, 12), np.float32)})[0].shape == (batch, 10)
    every = [d for v in fixed.graph.value_info for d in v.type.tensor_type.shape.dim]
    assert every
    assert all(d.dim_value > 0 for d in every)
    assert verify_onnx(fixed, program, samples(program, batch=2), execute).ok(0)
    with pytest.raises(ExportError, match="batch size 0"):
        program_to_onnx(program, dynamic_batch=False, batch_size=0)


def test_every_tensor_of_the_user_has_a_stated_shape() -> None:
    program = residual_network()
    known = {v.name: v for v in program_to_onnx(program).graph.value_info}
    for name, info in program.tensors.items():
        if info.encoding is not None:
            sizes = known[f"{name}/codes"].type.tensor_type.shape.dim
            assert [d.dim_value or d.dim_param for d in sizes] == ["batch" if d == B else d for d in info.shape]


def test_a_narrow_range_is_clipped_and_still_fused(tmp_path: Path) -> None:
    x, y = enc(), enc("int8", -2.0, 2.0, qmin=-120, qmax=120)
    w = weight("w", torch.randn(8, 4, 1, 1))
    assert w.encoding is not None
    program = single(
        "conv",
        (B, 4, 5, 5),
        (B, 8, 5, 5),
        x,
        y,
        (w, bias("b", torch.randn(8), x, w.encoding)),
        stride=(1, 1),
        padding=((0, 0), (0, 0)),
        dilation=(1, 1),
        groups=1,
    )
    model = program_to_onnx(program)
    probe = verify_onnx(model, program, samples(program, spread=4.0), execute, level="layers")
    assert probe.worst.max_difference <= 1, str(probe)
    assert "QLinearConv" in optimized(model, tmp_path)
    output = session(model_bytes(model)).run(None, {"x": samples(program, spread=9.0)[0][0].numpy()})[0]
    assert int(np.round(output / y.scale[0]).max()) == 120


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "int16"])
@pytest.mark.parametrize("kind", ["quantize", "reshape", "max_pool"])
def test_narrow_ranges_of_every_width(dtype: str, kind: str) -> None:
    e = enc(dtype, -2.0, 2.0, qmin=-5 if dtype.startswith("i") else 1, qmax=6)
    attrs = {
        "quantize": None,
        "reshape": {"shape": (-1, 16)},
        "max_pool": {
            "kernel": (1, 1),
            "stride": (1, 1),
            "padding": ((0, 0), (0, 0)),
            "dilation": (1, 1),
            "ceil_mode": False,
        },
    }[kind]
    if attrs is None:
        program = single("identity", (B, 4, 2, 2), (B, 4, 2, 2), e, e)
    else:
        program = single(kind, (B, 4, 2, 2), (B, 16) if kind == "reshape" else (B, 4, 2, 2), e, e, **attrs)
    model = program_to_onnx(program)
    assert kinds(model).count("Clip") == 1  # only where floats become codes
    assert verify_onnx(model, program, samples(program, spread=3.0), execute, level="layers").ok(0)


def test_outputs_that_are_inputs_or_returned_twice_or_float_are_copied() -> None:
    b = Builder()
    x = b.input("x", (B, 4), None)
    y = b.op("table", "y", (x,), (B, 4), None, function="tanh", params={})
    for name in (x, y, y):
        b.output(name)
    program = b.program()
    model = program_to_onnx(program)
    assert [v.name for v in model.graph.output] == ["x/output", "y", "y/output"]
    assert verify_onnx(model, program, samples(program), execute).ok(0.01)


def test_a_value_that_is_both_output_and_operand() -> None:
    b, e = Builder(), enc()
    x = b.input("x", (B, 4), e)
    y = b.op("table", "y", (x,), (B, 4), e, function="tanh", params={})
    z = b.op("add", "z", (y, x), (B, 4), enc(low=-4.5, high=4.1))
    for name in (y, z, x):
        b.output(name)
    program = b.program()
    model = program_to_onnx(program)
    assert [v.name for v in model.graph.output] == ["y", "z", "x/output"]
    assert verify_onnx(model, program, samples(program), execute, level="layers").ok(1)


def test_a_parameter_called_like_a_tensor_keeps_the_two_apart() -> None:
    b = Builder()
    x = b.input("scale", (B, 4), None)
    key = b.constant(Constant("scale", torch.tensor([2.0])))
    # the program itself cannot hold both under one key: the constant bears the key of the state_dict
    program = Program(
        (x,),
        ("y",),
        (Op("quantize", "scale", (x,), ("scale.codes",)), Op("mul", "y", ("scale.codes", "k"), ("y",))),
        {
            x: TensorInfo(x, (B, 4)),
            "scale.codes": TensorInfo("scale.codes", (B, 4), enc()),
            "y": TensorInfo("y", (B, 4)),
        },
        {"k": Constant("scale", b.constants[key].value)},
    )
    assert verify_onnx(program_to_onnx(program), program, samples(program), execute).ok(1)


def test_several_inputs_of_several_dtypes() -> None:
    b = Builder()
    x, ids = b.input("x", (B, 4), enc()), "ids"
    b.tensors[ids] = TensorInfo(ids, (B, 4), None, torch.int64)
    b.inputs.append(ids)
    b.output(ids)
    b.output(x)
    program = b.program()
    model = program_to_onnx(program)
    assert [v.type.tensor_type.elem_type for v in model.graph.input] == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    inputs = [(torch.randn(2, 4), torch.arange(8).reshape(2, 4))]
    assert verify_onnx(model, program, inputs, execute).ok(0)


def test_four_bit_codes_are_packed_low_half_first() -> None:
    signed = integer_tensor("w", np.array([[-8, 7, -1]], np.int8), "int4")
    assert (list(signed.dims), signed.raw_data) == ([1, 3], bytes([0x78, 0x0F]))
    unsigned = integer_tensor("w", np.array([1, 15], np.uint8), "uint4")
    assert unsigned.raw_data == bytes([0xF1])
    assert onnx.numpy_helper.to_array(signed).astype(np.int32).tolist() == [[-8, 7, -1]]


def test_an_unknown_kind_and_an_unknown_function_are_refused() -> None:
    with pytest.raises(ExportError, match=r"'block\.y' of kind 'fft' has no ONNX spelling"):
        program_to_onnx(single("fft", (B, 4), (B, 4), enc(), enc()))
    with pytest.raises(ExportError, match=r"'block\.y' computes 'zeta'"):
        program_to_onnx(single("table", (B, 4), (B, 4), enc(), enc(), function="zeta", params={}))


def test_an_integer_bias_with_a_zero_point_is_refused() -> None:
    w, e = weight("w", torch.randn(4, 4)), Encoding("int32", (0.1,), (3,), -(2**31), 2**31 - 1)
    program = single("linear", (B, 4), (B, 4), enc(), enc(), (w, Constant("b", torch.zeros(4, dtype=torch.int32), e)))
    with pytest.raises(ExportError, match="'b' has int32 codes with a zero point"):
        program_to_onnx(program)


def test_a_batch_size_that_no_input_has_is_asked_for() -> None:
    b = Builder()
    b.input("x", (4, 2), None)
    k = b.constant(Constant("k", torch.ones(1, 3)))
    b.output(b.op("expand", "y", (k,), (B, 3), None, shape=(B, 3)))
    with pytest.raises(ExportError, match=r"operator 'y' needs the batch size.*dynamic_batch=False"):
        program_to_onnx(b.program())
    assert program_to_onnx(b.program(), dynamic_batch=False, batch_size=4).graph.output[0].name == "y"
