"""The Hexagon package: what is in it, and what Qualcomm's emulator and AIMET make of it where they are installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qat
from qat.errors import ExportError, TargetError, VerificationError
from qat.export import htp
from qat.export.io_mode import IoMode
from qat.integer.program import Op
from qat.interop.aimet import read_aimet
from qat.packages import hexagon, hexagon_runtimes
from qat.packages.build import package
from qat.packages.executor import Executor
from qat.packages.golden import golden_samples
from qat.packages.source import Source
from qat.packages.verify import verify_package

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")
emulator = pytest.mark.skipif(not htp.available(), reason="onnxruntime-qnn is not installed")
X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """What the HTP has rules for: SiLU, layer norm, PReLU, softmax, a constant, a concat, data movement."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.slope, self.norm, self.head = nn.PReLU(8), nn.LayerNorm(16), nn.Linear(16, 5)
        self.c = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.a(x))
        b = self.slope(self.b(torch.relu(a + self.c)))
        return torch.softmax(self.head(self.norm(torch.cat([a, b], 1).flatten(2).mean(-1))), -1)


def prepared(model: nn.Module, *targets: str, dtype: str = "uint8", **layers: str) -> qat.PreparedModel:
    torch.manual_seed(0)
    scheme = {"activations": {"dtype": dtype, "observer": "minmax"}, "layers": layers}
    qmodel = qat.prepare(model.eval(), X, target=qat.load_target(*targets), scheme=scheme)
    qat.calibrate(qmodel, [X], progress=False)
    return qmodel


def with_a_float() -> qat.PreparedModel:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    return prepared(Partly(), "hexagon-v73", act="float")


def source(qmodel: qat.PreparedModel, *targets: str, samples: int = 2) -> Source:
    return Source(qmodel, "net", tuple((x[None],) for x in X[:samples]), targets)


@pytest.fixture(scope="module")
def qmodel() -> qat.PreparedModel:
    torch.manual_seed(0)
    return prepared(Net(), "hexagon-v73", "hexagon-v68")


def by_name(targets: Sequence[str]) -> dict[str, Executor]:
    return {executor.name: executor for executor in hexagon_runtimes.executors(targets)}


# -- without the emulator


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(htp, "available", lambda: False)
    monkeypatch.setattr(hexagon, "available", lambda: False)
    monkeypatch.setattr(hexagon_runtimes, "find_spec", lambda name: None)


def test_what_is_written_without_the_emulator(
    qmodel: qat.PreparedModel, nothing_installed: None, tmp_path: Path
) -> None:
    artifacts, omitted = hexagon.write(source(qmodel, "hexagon-v73"), tmp_path, IoMode())
    assert [(a.path, a.format) for a in artifacts] == [("model.onnx", "onnx"), ("float.onnx", "onnx-encodings")]
    assert omitted == {
        "contexts/v73/model_ctx.onnx": "compiling it needs onnxruntime-qnn; pip install 'qat[hexagon]' and make the "
        "package again"
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx", "float.onnx", "float.encodings", "float.v2.encodings"
    }  # fmt: skip
    shape = onnx.load(str(tmp_path / "model.onnx")).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 12, 12]


def test_a_package_without_the_emulator_says_so(
    qmodel: qat.PreparedModel, nothing_installed: None, tmp_path: Path
) -> None:
    made = package(qmodel, "hexagon-v73", tmp_path / "p")
    assert made.manifest.standing == "partly verified"
    states = {check.executor: (check.status, check.notes) for check in made.manifest.checks}
    assert states["onnxruntime"][0] == "passed"
    assert states["htp-v73"] == (
        "not run", ("Qualcomm's HTP emulator (onnxruntime-qnn) is missing", "pip install 'qat[hexagon]'")
    )  # fmt: skip
    assert states["aimet"] == ("not run", ("AIMET (aimet-onnx) is missing", "pip install aimet-onnx"))
    assert "onnx-encodings" in (tmp_path / "p" / "manifest.json").read_text()
    assert "float.onnx" in (tmp_path / "p" / "README.md").read_text()


def test_the_float_model_rounds_to_the_codes(
    qmodel: qat.PreparedModel, nothing_installed: None, tmp_path: Path
) -> None:
    hexagon.write(source(qmodel, "hexagon-v73"), tmp_path, IoMode("codes", "codes"))
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "float.onnx")).graph.initializer}
    coded = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    table = read_aimet(tmp_path / "float.v2.encodings")
    weights = [name for name in table if name in floats]
    assert {"a.weight", "a.bias", "norm.weight", "norm.bias", "slope.weight", "c"} <= set(weights)
    for name in weights:
        codes = table[name].quantize(torch.tensor(floats[name])).numpy()
        np.testing.assert_array_equal(codes.flatten(), coded[f"{name}/codes"].astype(np.int64).flatten())
    strict = read_aimet(tmp_path / "float.encodings")
    # AIMET simulates no int32 biases
    assert set(table) - set(strict) == {"a.bias", "b.bias", "head.bias", "norm.bias"}
    assert {"x", "act.sigmoid", "act", "cat", "softmax"} <= set(strict)
    assert json.loads((tmp_path / "float.encodings").read_text())["version"] == "1.0.0"


def test_what_is_float_is_told(nothing_installed: None, tmp_path: Path) -> None:
    artifacts, _ = hexagon.write(source(with_a_float(), "hexagon-v73"), tmp_path, IoMode())
    assert dict(artifacts[0].options) == {"float_operators": "act"}


def test_targets() -> None:
    assert hexagon.architecture("hexagon-v79") == 79
    with pytest.raises(TargetError, match="'arm-cpu' is no Hexagon target; use hexagon-v68, hexagon-v69"):
        hexagon.architecture("arm-cpu")
    names = [executor.name for executor in hexagon_runtimes.executors(["hexagon-v68", "hexagon-v73"])]
    assert names == ["onnxruntime", "htp-v68", "htp-v73", "htp-context-v68", "htp-context-v73", "aimet"]
    assert set(hexagon.TARGETS) <= set(qat.targets.target_names())


# -- on the emulator


@emulator
def test_a_package_on_the_emulator(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    made = package(qmodel, ["hexagon-v68", "hexagon-v73"], tmp_path / "p", golden=2)
    assert made.manifest.omitted == {}
    checks = {(check.artifact, check.executor): check for check in made.manifest.checks}
    for arch in (68, 73):
        whole = checks["model.onnx", f"htp-v{arch}"]
        context = checks[f"contexts/v{arch}/model_ctx.onnx", f"htp-context-v{arch}"]
        assert (whole.status, context.status) == ("passed", "passed")
        assert whole.outputs == context.outputs
        assert whole.outputs[0].max_difference <= 3
        assert "none on the CPU, 0 float tensors" in whole.notes[0]
        assert "operators alone: at most 1 code off" in whole.notes[1]
    assert f"htp-context-v{68}" not in {e for a, e in checks if a == "contexts/v73/model_ctx.onnx"}
    assert verify_package(tmp_path / "p").standing == made.manifest.standing


@emulator
@pytest.mark.parametrize("io", [IoMode("codes", "codes"), IoMode("codes", "float"), IoMode("float", "codes")])
def test_codes_at_the_borders(qmodel: qat.PreparedModel, io: IoMode, tmp_path: Path) -> None:
    from_model = source(qmodel, "hexagon-v73")
    artifacts, omitted = hexagon.write(from_model, tmp_path, io)
    assert omitted == {}
    executors = by_name(["hexagon-v73"])
    for artifact, name in zip(artifacts, ("htp-v73", "htp-context-v73"), strict=False):
        inputs, outputs = golden_samples(from_model.simulation("onnx"), artifact, from_model.batches)
        found, _ = executors[name].run(tmp_path / artifact.path, artifact, inputs)
        contract = artifact.outputs[0]
        step = 1 if contract.dtype == "uint8" else contract.scale
        for have, want in zip(found, outputs, strict=True):
            assert have[contract.name].dtype == want[contract.name].dtype
            apart = have[contract.name].astype(np.float64) - want[contract.name].astype(np.float64)
            assert np.abs(apart).max() <= 3.01 * step


@emulator
def test_a_float_tensor_that_nobody_planned(tmp_path: Path) -> None:
    from_model = source(with_a_float(), "hexagon-v73")
    (artifact, *_), _ = hexagon.write(from_model, tmp_path, IoMode())
    run = by_name(["hexagon-v73"])["htp-v73"].run
    inputs, _ = golden_samples(from_model.simulation("onnx"), artifact, from_model.batches)
    _, notes = run(tmp_path / artifact.path, artifact, inputs)
    assert notes[1] == "float by the plan: act"
    silent = type(artifact)(artifact.path, "onnx", "onnx", artifact.inputs, artifact.outputs)
    with pytest.raises(VerificationError, match=r"HTP v73 computes '.*' in float, which the plan calls integer"):
        run(tmp_path / artifact.path, silent, inputs)


@emulator
def test_an_operator_that_is_wrong_is_named(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (artifact, *_), _ = hexagon.write(source(qmodel, "hexagon-v73"), tmp_path, IoMode())
    monkeypatch.setattr(hexagon_runtimes, "OPERATOR_BOUND", {8: -1, 16: -1})
    with pytest.raises(VerificationError, match=r"HTP v73 is . codes off in 'a' alone, where -1 may be"):
        hexagon_runtimes.check_operators(tmp_path / artifact.path, {"x": X[:1].numpy()}, 73)


@emulator
def test_a_context_binary_of_another_generation_or_model(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    from_model = source(qmodel, "hexagon-v73", samples=1)
    (model, context, _), _ = hexagon.write(from_model, tmp_path, IoMode())
    run = by_name(["hexagon-v73"])["htp-context-v73"].run
    inputs, _ = golden_samples(from_model.simulation("onnx"), context, from_model.batches)
    assert "gives what the model gives" in run(tmp_path / context.path, context, inputs)[1][0]
    wrapper = tmp_path / context.path
    blob = next(wrapper.parent.glob("*.bin"))
    kept, kept_wrapper = blob.read_bytes(), wrapper.read_bytes()
    wrapper.unlink()
    htp.write_context(tmp_path / model.path, 75, wrapper)
    with pytest.raises(VerificationError, match=r"model_ctx_qnn.bin is not for HTP v73"):
        run(wrapper, context, inputs)
    blob.write_bytes(kept)
    wrapper.write_bytes(kept_wrapper)
    torch.manual_seed(1)
    other = prepared(Net(), "hexagon-v73")
    qat.export_onnx(other, tmp_path / model.path, verify=False)
    with pytest.raises(VerificationError, match="gives another 'softmax' than the model that it was compiled from"):
        run(wrapper, context, inputs)
    blob.unlink()
    with pytest.raises(ExportError, match=r"model_ctx\.onnx names no context binary beside it"):
        run(wrapper, context, inputs)


@emulator
def test_compiling_what_cannot_run_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="HTP v73 cannot execute all of"):
        htp.write_context(tmp_path / "none.onnx", 73, tmp_path / "ctx.onnx")
    with pytest.raises(ExportError, match="the HTP emulator has no v66"):
        htp.write_context(tmp_path / "none.onnx", 66, tmp_path / "ctx.onnx")


@emulator
def test_nothing_is_said_on_standard_output(
    qmodel: qat.PreparedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hexagon.write(source(qmodel, "hexagon-v73"), tmp_path, IoMode())
    assert capfd.readouterr().out == ""


@emulator
@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("arch", [68, 79])
def test_types(dtype: str, arch: int, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Conv2d(3, 8, 3), nn.SiLU()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.act(self.a(x)).mean((2, 3))))

    torch.manual_seed(0)
    target = f"hexagon-v{arch}"
    made = package(prepared(Plain(), target, dtype=dtype), target, tmp_path / "p", golden=2)
    check = next(check for check in made.manifest.checks if check.executor == f"htp-v{arch}")
    assert check.status == "passed"
    assert check.outputs[0].max_difference <= (512 if dtype == "uint16" else 3)


# -- AIMET


@pytest.mark.heavy
def test_aimet_simulates_the_same(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    pytest.importorskip("aimet_onnx")
    from_model = source(qmodel, "hexagon-v73", samples=4)
    artifacts, _ = hexagon.write(from_model, tmp_path, IoMode())
    artifact = artifacts[-1]
    inputs, outputs = golden_samples(from_model.simulation("onnx"), artifact, from_model.batches)
    found, notes = hexagon_runtimes.AIMET.run(tmp_path / artifact.path, artifact, inputs)
    contract = artifact.outputs[0]
    assert contract.scale is not None
    for have, want in zip(found, outputs, strict=True):
        assert np.abs(have[contract.name] - want[contract.name]).max() <= 2.01 * contract.scale
    assert "quantizers" in notes[0]


def test_every_operator_is_computed_by_one_of_the_ways(qmodel: qat.PreparedModel) -> None:
    program = qat.convert(qmodel).program
    assert hexagon.float_operators(program) == ()
    extra = Op("table", "t", (program.outputs[0],), (program.outputs[0],), {"function": "erf"})
    assert hexagon.float_operators(type(program)(**{**program.__dict__, "ops": (*program.ops, extra)})) == ("t",)
