"""Verification: what is compared, what is found, and that a difference leaves no file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_programs import B, enc, execute, residual_network, samples, single
from torch import Tensor

from qat.encoding import Encoding
from qat.errors import DataError, ExportError, OutputError, VerificationError
from qat.export.difference import Tally, TensorDifference, Verification, codes_of
from qat.export.onnx import program_to_onnx
from qat.export.runtime import session_entries
from qat.export.verify import export_program, verify_onnx
from qat.integer.program import Constant, Program


class Tampered:
    """The reference, with some codes of one tensor changed."""

    def __init__(self, name: str, by: int, share: float = 1.0) -> None:
        self.name, self.by, self.share = name, by, share

    def __call__(self, program: Program, inputs: tuple[Tensor, ...], names: set[str]) -> Mapping[str, Tensor]:
        values = dict(execute(program, inputs, names))
        if self.name in values:
            flat = values[self.name].clone().flatten()
            count = math.ceil(self.share * flat.numel())
            flat[:count] += torch.where(flat[:count] > 100, -self.by, self.by)
            values[self.name] = flat.reshape(values[self.name].shape)
        return values


def test_an_export_is_written_executed_and_described(tmp_path: Path) -> None:
    program, path = residual_network(), tmp_path / "out" / "model.onnx"
    result = export_program(program, path, samples(program), execute)
    assert result.path == path
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.opset == 21
    assert result.verification is not None
    assert result.verification.samples == 6
    assert [t.name for t in result.verification.tensors] == ["classifier"]
    assert result.verification.tensors[0].count == 60
    assert result.verification.options == tuple(f"{k}={v}" for k, v in session_entries().items())
    assert "verified in ONNX Runtime" in str(result)
    assert len(result.overflow.layers) == 3
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_without_verification_nothing_is_executed(tmp_path: Path) -> None:
    result = export_program(residual_network(), tmp_path / "m.onnx", iter(()), Tampered("classifier", 9), verify=False)
    assert result.verification is None
    assert "not executed" in str(result)
    assert (tmp_path / "m.onnx").exists()


def test_a_difference_raises_and_leaves_no_file(tmp_path: Path) -> None:
    program = residual_network()
    with pytest.raises(
        VerificationError, match=r"'classifier' of .*m\.onnx differs.* by up to 3 codes, 100 %"
    ) as caught:
        export_program(program, tmp_path / "m.onnx", samples(program), Tampered("classifier", 3))
    assert caught.value.exit_status == 1
    assert "allowed: 1 codes, 1 %" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_leaves_the_previous_file_alone(tmp_path: Path) -> None:
    program, path = residual_network(), tmp_path / "m.onnx"
    path.write_bytes(b"before")
    with pytest.raises(VerificationError):
        export_program(program, path, samples(program), Tampered("classifier", 2))
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_bounds_are_the_callers(tmp_path: Path) -> None:
    program = residual_network()
    inputs = samples(program, batch=64)
    one_off = Tampered("classifier", 1, share=0.05)
    with pytest.raises(VerificationError, match=r"by up to 1 codes, 5\.\d+ % of"):
        export_program(program, tmp_path / "m.onnx", inputs, one_off)
    assert export_program(program, tmp_path / "m.onnx", inputs, one_off, unequal_share=None).verification
    assert export_program(program, tmp_path / "m.onnx", inputs, one_off, unequal_share=0.06).verification
    with pytest.raises(VerificationError):
        export_program(program, tmp_path / "m.onnx", inputs, one_off, unequal_share=0.06, bound=0)


def test_layers_show_where_a_difference_begins(tmp_path: Path) -> None:
    program = residual_network()
    tampered = Tampered("features.1.add", 2)
    outputs = verify_onnx(program_to_onnx(program), program, samples(program), tampered)
    assert outputs.ok(0)
    layers = verify_onnx(program_to_onnx(program), program, samples(program), tampered, level="layers")
    assert [t.name for t in layers.tensors] == [
        "classifier",
        *("x", "features.0", "features.1.conv", "features.1.add", "pool", "avgpool", "flatten"),
    ]
    assert [t.name for t in layers.failures(0)] == ["features.1.add"]
    assert layers.worst == TensorDifference("features.1.add", "uint8", 6912, 2.0, 6912)
    # the bound is one on the outputs: what differs inside and vanishes is shown, not refused
    result = export_program(program, tmp_path / "m.onnx", samples(program), tampered, verify="layers")
    assert result.verification is not None
    assert result.verification.worst.name == "features.1.add"


def test_layers_in_several_runs_are_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    program = residual_network()
    once = verify_onnx(program_to_onnx(program), program, samples(program), execute, level="layers")
    monkeypatch.setattr("qat.export.verify._CODES_AT_ONCE", 5000)
    assert verify_onnx(program_to_onnx(program), program, samples(program), execute, level="layers") == once


def test_a_model_that_was_changed_is_found_out() -> None:
    program = residual_network()
    model = program_to_onnx(program)
    (codes,) = [t for t in model.graph.initializer if t.name == "classifier.bias/codes"]
    codes.raw_data = (np.frombuffer(codes.raw_data, np.int32) + 2000).tobytes()
    assert not verify_onnx(model, program, samples(program), execute).ok()


def test_the_record_as_text_and_as_json() -> None:
    record = Verification("ONNX Runtime 9", "outputs", 3, (TensorDifference("head", "uint8", 200, 1.0, 4),))
    assert json.loads(json.dumps(record.to_json()))["tensors"] == [
        {"name": "head", "dtype": "uint8", "count": 200, "max_difference": 1.0, "unequal": 4, "unequal_share": 0.02}
    ]
    assert record.to_json()["options"] == []
    first, _, row = str(record).splitlines()
    assert first == "ONNX Runtime 9, 3 samples, compared: outputs"
    assert row.split() == ["head", "uint8", "200", "1", "4", "(2", "%)"]


def test_four_codes_are_never_held_against_the_share() -> None:
    assert TensorDifference("y", "uint8", 20, 1.0, 4).within(1, 0.01)
    assert not TensorDifference("y", "uint8", 20, 1.0, 5).within(1, 0.01)
    assert not TensorDifference("y", "uint8", 20, 2.0, 1).within(1, 0.01)


def test_sixteen_bit_codes_count_as_parts_of_an_eight_bit_one() -> None:
    fine = TensorDifference("y", "uint16", 1000, 200.0, 900)
    assert fine.within(1, 0.01)
    assert not fine.within(0.5, 0.01)
    coarse = TensorDifference("x", "uint8", 1000, 1.0, 1)
    record = Verification("ONNX Runtime 9", "outputs", 3, (fine, coarse))
    assert record.worst == coarse


def test_float_tensors_are_compared_on_a_grid_of_their_own_size() -> None:
    tally = Tally("y", None)
    simulated = torch.tensor([-255.0, 10.0, math.inf, math.nan])
    tally.add(torch.tensor([-254.75, 10.0, math.inf, math.nan]), simulated)
    assert tally.result() == TensorDifference("y", "float32", 4, 0.25, 0)
    tally.add(torch.tensor([-253.0, 10.0, math.inf, math.nan]), simulated)
    assert tally.result() == TensorDifference("y", "float32", 8, 2.0, 1)
    tally.add(torch.tensor([-255.0, 10.0, 3.0, math.nan]), simulated)
    assert tally.result().max_difference == math.inf


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int4"])
@pytest.mark.parametrize("scale", [2.0**-40, 0.1, 0.0235294, 3.0, 1e20])
def test_dequantized_values_give_their_codes_back(dtype: str, scale: float) -> None:
    template = enc(dtype)
    e = Encoding(dtype, (scale,), (template.zero_point[0],), template.qmin, template.qmax)
    every = torch.arange(e.qmin, e.qmax + 1)
    assert torch.equal(codes_of(e.dequantize(every), e), every)


def test_values_outside_the_range_are_differences() -> None:
    e = Encoding("int8", (0.5,), (0,), -100, 100)
    assert codes_of(torch.tensor([60.0, -60.0]), e).tolist() == [120, -120]
    assert codes_of(torch.tensor([math.nan, math.inf]), e).abs().min() > 1000


def test_a_shape_that_differs_is_named() -> None:
    with pytest.raises(VerificationError, match=r"'y' has shape \(2, 3\) in the runtime and \(3, 2\)"):
        Tally("y", None).add(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no samples to verify with"),
        ([torch.zeros(2, 3, 12, 11)], r"'x' is \(2, 3, 12, 11\) where the model takes \(-1, 3, 12, 12\)"),
        ([torch.zeros(2, 3, 12)], "'x' is"),
        ([(torch.zeros(2, 3, 12, 12),) * 2], "2 tensors where the model takes 1"),
        ([("x",)], "'x' is str"),
    ],
)
def test_samples_that_do_not_fit_are_named(given: list[object], message: str) -> None:
    program = residual_network()
    with pytest.raises(DataError, match=message):
        verify_onnx(program_to_onnx(program), program, given, execute)


def test_files_that_are_no_models_and_levels_that_do_not_exist(tmp_path: Path) -> None:
    program = residual_network()
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"cannot read .*m\.onnx as an ONNX model"):
        verify_onnx(tmp_path / "m.onnx", program, samples(program), execute)
    with pytest.raises(ExportError, match=r"cannot read .*absent\.onnx"):
        verify_onnx(tmp_path / "absent.onnx", program, samples(program), execute)
    with pytest.raises(ExportError, match="unknown verification level 'all'"):
        verify_onnx(program_to_onnx(program), program, samples(program), execute, level="all")  # type: ignore[arg-type]
    other = single("identity", (B, 4), (B, 4), None, None)
    two = Program(other.inputs, (*other.outputs, *other.outputs), other.ops, other.tensors, other.constants)
    with pytest.raises(ExportError, match="1 outputs and the program 2"):
        verify_onnx(program_to_onnx(other), two, [torch.zeros(2, 4)], execute)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program = residual_network()
    with pytest.raises(OutputError, match="cannot write"):
        export_program(program, tmp_path / "file" / "m.onnx", samples(program), execute)


def test_an_overflow_stops_the_export_before_anything_is_written(tmp_path: Path) -> None:
    w = Constant("w", torch.ones(1, 2, dtype=torch.int8), Encoding("int8", (0.1,), (0,), -128, 127))
    b = Constant(
        "b", torch.tensor([2**31 - 1], dtype=torch.int32), Encoding("int32", (0.1,), (0,), -(2**31), 2**31 - 1)
    )
    program = single("linear", (B, 2), (B, 1), enc(), enc(), (w, b))
    with pytest.raises(ExportError, match=r"layer 'block\.y'"):
        export_program(program, tmp_path / "m.onnx", samples(program), execute)
    assert list(tmp_path.iterdir()) == []
