"""The APU's artifact, and what MediaTek's compiler plug-in makes of it, without an APU and without NeuroPilot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.errors import ExportError, VerificationError
from qat.export.io_mode import IoMode
from qat.packages import apu
from qat.packages.artifact import Artifact
from qat.packages.executor import Missing
from qat.packages.neuron import library, plugin
from qat.packages.neuron.compare import CODES, compare
from qat.packages.neuron.record import NeuronModel, Operand, parse
from qat.packages.source import Source

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install 'qat[litert]'")
_MISSING = apu.apu_executors()[0].missing()
needs_plugin = pytest.mark.skipif(_MISSING is not None, reason=f"needs {_MISSING.what if _MISSING else ''}")
BOTH = IoMode("codes", "codes")


class Small(nn.Module):
    """Convolutions with a scale a channel, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x + self.point(F.relu6(self.deep(x)))
        return self.fc((torch.sigmoid(x) * x).mean((2, 3)))


class Wide(nn.Module):
    """Most operators that TFLite and the plug-in both have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc, self.query, self.slope = nn.Linear(4, 10), nn.Linear(10, 10), nn.PReLU(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.hardswish(self.slope(self.conv(x))).clamp(-0.2, 0.3)
        x = F.leaky_relu(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)[:, 2:10])
        x = F.interpolate(F.interpolate(x, scale_factor=2, mode="bilinear"), scale_factor=2, mode="nearest")
        x = torch.tanh(F.gelu(self.up(F.avg_pool2d(x, 2))))
        x = self.fc(x.flatten(2).transpose(1, 2))[:, :16]
        x = torch.matmul(torch.softmax(torch.matmul(x, self.query(x).transpose(1, 2)), -1), x)
        return x * 0.5 - 1.5, F.pad(x, (1, 1), value=0.5)[:, ::2]


def write(model: nn.Module, path: Path, io: IoMode = BOTH, target: str = "apu") -> Artifact:
    torch.manual_seed(0)
    x = torch.randn(50, 3, 16, 16)
    qmodel = qat.prepare(model.eval(), (x[:1],), target=qat.load_target(target))
    qat.calibrate(qmodel, [x])
    return apu.write_apu(Source(qmodel, "net", (), (target,)), path, io)


def run(folder: Path, artifact: Artifact) -> tuple[str, ...]:
    outputs, notes = apu.apu_executors()[0].run(folder / artifact.path, artifact, ())
    assert outputs == ()
    return notes


def recorded(path: Path, folder: Path) -> NeuronModel:
    record = folder / "record"
    assert plugin.apply(path, folder / "applied.tflite", "mt6989", library.stand_in().parent, record) == ()
    (model,) = parse(record.read_text())
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A package's folder and the artifact in it."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    return folder, write(Small(), folder)


@pytest.fixture(scope="module")
def pair(small: tuple[Path, Artifact], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, NeuronModel]:
    """The file's bytes and what the plug-in made of them."""
    if _MISSING is not None:
        pytest.skip(f"needs {_MISSING.what}")
    path = small[0] / small[1].path
    return path.read_bytes(), recorded(path, tmp_path_factory.mktemp("record"))


# what is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["float", "codes"])
@pytest.mark.parametrize("outputs", ["float", "codes"])
def test_the_artifact_says_what_it_takes_and_gives(inputs: str, outputs: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = write(Small(), tmp_path, IoMode(inputs, outputs))  # type: ignore[arg-type]
    assert (tmp_path / artifact.path).read_bytes()[4:8] == b"TFL3"
    assert (artifact.format, artifact.numerics) == ("tflite", "tflite")
    assert artifact.inputs[0].dtype == ("float32" if inputs == "float" else "int8")
    assert artifact.outputs[0].dtype == ("float32" if outputs == "float" else "int8")
    assert apu.apu_executors()[0].accepts(artifact)


def test_other_packages_files_are_not_inspected(small: tuple[Path, Artifact]) -> None:
    (executor,) = apu.apu_executors()
    assert executor.role == "inspection"
    assert not executor.accepts(replace(small[1], options=()))
    assert not executor.accepts(replace(small[1], format="onnx"))


# legalization ---------------------------------------------------------------------------------------------------------


@needs_plugin
def test_every_operator_has_a_legalization_with_the_same_grids(small: tuple[Path, Artifact]) -> None:
    notes = run(*small)
    assert "each of the 9 operators" in notes[0]
    assert "8 weights and biases" in notes[0]
    assert "nothing was executed" in notes[1]
    assert "stand-in" in apu.apu_executors()[0].runtime()


@needs_plugin
@pytest.mark.parametrize("io", [BOTH, IoMode("float", "float"), IoMode("float", "codes")], ids=str)
def test_most_operators_of_the_target(io: IoMode, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert "has a Neuron operation" in run(tmp_path, write(Wide(), tmp_path, io))[0]


@needs_plugin
def test_an_operator_without_legalization_is_named(tmp_path: Path) -> None:
    class Mish(Small):
        def forward(self, x: Tensor) -> Tensor:
            return F.mish(self.conv(x))

    with pytest.raises(VerificationError, match=r"1 operators of model\.tflite: GATHER 'mish'"):
        run(tmp_path, write(Mish(), tmp_path, target="litert"))


def test_the_target_forbids_what_the_plugin_cannot_spell() -> None:
    class Mish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.mish(x) + x

    plan = qat.plan(Mish(), (torch.randn(1, 3, 4, 4),), target=qat.load_target("apu"))
    assert "mish" in str(plan)
    assert "GATHER" not in CODES


# what the comparison would find ---------------------------------------------------------------------------------------


def change(model: NeuronModel, number: int, **fields: object) -> NeuronModel:
    operands = list(model.operands)
    operands[number] = replace(operands[number], **fields)  # type: ignore[arg-type]
    return replace(model, operands=tuple(operands))


def first(model: NeuronModel, test: Callable[[Operand], bool]) -> int:
    return next(n for n, operand in enumerate(model.operands) if test(operand))


def test_the_true_record_agrees(pair: tuple[bytes, NeuronModel]) -> None:
    found = compare(*pair)
    assert (found.operators, found.constants) == (9, 8)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"scale": 0.5}, "scale 0\\.0\\d+ became 0.5"),
        ({"zero_point": 99}, "zero point .* became 99"),
        ({"type": 3}, "INT8 became TENSOR_FLOAT32"),
        ({"type": 777}, "INT8 became 777"),
        ({"sizes": (1, 16, 3, 16)}, "sizes .* became"),
    ],
)
def test_another_grid_of_an_activation_is_found(
    fields: dict[str, object], cause: str, pair: tuple[bytes, NeuronModel]
) -> None:
    content, model = pair
    with pytest.raises(VerificationError, match=f"tensor 'x' is another in Neuron: {cause}"):
        compare(content, change(model, model.inputs[0], **fields))
    last = model.outputs[0]
    with pytest.raises(VerificationError, match="'fc' is"):
        compare(content, change(model, last, **fields))


@pytest.mark.parametrize("field", ["crc", "channel_scales", "channel_axis", "type", "sizes"])
def test_another_weight_is_found(field: str, pair: tuple[bytes, NeuronModel]) -> None:
    content, model = pair
    weight = first(model, lambda operand: len(operand.channel_scales) > 1)
    held = model.operands[weight]
    other = {
        "crc": 1,
        "channel_scales": held.channel_scales[::-1],
        "channel_axis": held.channel_axis + 1,
        "type": 14,
        "sizes": held.sizes[::-1],
    }
    with pytest.raises(VerificationError, match=r"CONV_2D .* 'conv.weight'"):
        compare(content, change(model, weight, **{field: other[field]}))


def test_another_bias_is_found(pair: tuple[bytes, NeuronModel]) -> None:
    content, model = pair
    bias = first(model, lambda operand: operand.type == 4 and operand.sizes == (8,))
    with pytest.raises(VerificationError, match=r"'conv\.bias'"):
        compare(content, change(model, bias, crc=1))


def test_other_operations_are_found(pair: tuple[bytes, NeuronModel]) -> None:
    content, model = pair
    operations = model.operations
    with pytest.raises(VerificationError, match="FULLY_CONNECTED 'fc' has no Neuron operation"):
        compare(content, replace(model, operations=operations[:-1]))
    with pytest.raises(VerificationError, match="1 operations more"):
        compare(content, replace(model, operations=(*operations, operations[-1])))
    with pytest.raises(VerificationError, match="became Neuron operation 21, not 9"):
        compare(content, replace(model, operations=(*operations[:-1], replace(operations[-1], code=21))))
    wrong = replace(operations[-1], inputs=(0, *operations[-1].inputs[1:]))
    with pytest.raises(VerificationError, match="'fc' does not read 'mean'"):
        compare(content, replace(model, operations=(*operations[:-1], wrong)))
    wrong = replace(operations[-1], outputs=(1, 0))
    with pytest.raises(VerificationError, match="'fc' has 1 results and its Neuron operation 2"):
        compare(content, replace(model, operations=(*operations[:-1], wrong)))
    with pytest.raises(VerificationError, match="0 inputs and the file 1"):
        compare(content, replace(model, inputs=()))
    with pytest.raises(VerificationError, match="'fc' is two operands"):
        compare(content, replace(model, outputs=(0,)))


def test_a_flattened_result_that_is_not_reshaped_is_found(pair: tuple[bytes, NeuronModel]) -> None:
    content, model = pair
    with pytest.raises(VerificationError, match="'fc' is not reshaped"):
        compare(content, change(model, model.outputs[0], sizes=(10,)))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("operand 0 14 0.5 0 sizes\n", "outside of a model"),
        ("model\noperand 0 14 0.5 0 sizes 1\n", "not finished it"),
        ("model\noperand 0 fourteen 0.5 0 sizes 1\nfinish\n", "none of them writes"),
        ("model\nvalue 3 1 1\nfinish\n", "none of them writes"),
        ("model\noperation 3 inputs 0\nfinish\n", "none of them writes"),
        ("model\nnonsense\nfinish\n", "none of them writes"),
    ],
)
def test_a_damaged_record_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ExportError, match=cause):
        parse(text)


# what may be missing or fail ------------------------------------------------------------------------------------------


def test_a_missing_plugin_or_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (executor,) = apu.apu_executors()
    monkeypatch.setattr(apu, "find_plugin", lambda: None)
    missing = executor.missing()
    assert isinstance(missing, Missing)
    assert "pip install" in missing.mend
    monkeypatch.setattr(apu, "find_plugin", lambda: object())
    monkeypatch.setenv("CC", "no-such-compiler-anywhere")
    missing = executor.missing()
    assert isinstance(missing, Missing)
    assert "needs a C compiler; install gcc or clang" in missing.mend
    with pytest.raises(ExportError, match="needs a C compiler"):
        library.stand_in()


@needs_plugin
def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = library.stand_in()
    assert made.is_relative_to(tmp_path)
    before = made.stat().st_mtime_ns
    assert library.stand_in() == made
    assert made.stat().st_mtime_ns == before


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ExportError, match=r"false does not compile stand_in.c \(exit status 1\)"):
        library.stand_in()
    assert not list(tmp_path.rglob("*.so"))


@needs_plugin
def test_what_the_plugin_refuses(tmp_path: Path, small: tuple[Path, Artifact]) -> None:
    path, output = small[0] / small[1].path, tmp_path / "out.tflite"
    with pytest.raises(ExportError, match=r"does not know 'mt1'; use one of mt6853"):
        plugin.apply(path, output, "mt1", tmp_path)
    with pytest.raises(ExportError, match=r"does not compile model.tflite for mt6989 \(.*NeuronAdapter"):
        plugin.apply(path, output, "mt6989", tmp_path)  # a folder without the library
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ExportError, match=r"does not compile damaged.tflite"):
        plugin.apply(damaged, output, "mt6989", library.stand_in().parent)


def test_a_missing_plugin_stops_the_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin, "find_plugin", lambda: None)
    with pytest.raises(ExportError, match="plug-in is not installed; pip install"):
        plugin.apply(tmp_path / "m", tmp_path / "o", "mt6989", tmp_path)


# ahead of time --------------------------------------------------------------------------------------------------------


def test_compilation_needs_the_sdk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEUROPILOT_SDK_ROOT", str(tmp_path))
    with pytest.raises(ExportError, match=r"model.tflite for mt6989 needs MediaTek's NeuroPilot SDK.*pip install"):
        apu.compile_apu(tmp_path / "model.tflite", tmp_path / "out.tflite", "mt6989")
    with pytest.raises(ExportError, match="does not know 'sm8550'"):
        apu.compile_apu(tmp_path / "model.tflite", tmp_path / "out.tflite", "sm8550")
    monkeypatch.delenv("NEUROPILOT_SDK_ROOT")
    monkeypatch.setattr(apu, "find_spec", lambda name: None)
    assert apu.sdk_libraries("mt6989") is None


@needs_plugin
@pytest.mark.parametrize("soc", ["mt6989", "mt6993"])
def test_compilation_with_the_stand_in_as_sdk(
    soc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: tuple[Path, Artifact]
) -> None:
    host = tmp_path / "host" / "lib"
    host.mkdir(parents=True)
    (host / library.NAME).symlink_to(library.stand_in())
    monkeypatch.setenv("NEUROPILOT_SDK_ROOT", str(tmp_path))
    output = tmp_path / "compiled" / "model.tflite"
    apu.compile_apu(small[0] / small[1].path, output, soc)
    content = output.read_bytes()
    assert b"DISPATCH_OP" in content
    assert b"qat stand-in, nothing was compiled" in content


@needs_plugin
def test_compilation_that_leaves_operators_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Mish(Small):
        def forward(self, x: Tensor) -> Tensor:
            return F.mish(self.conv(x))

    monkeypatch.setenv("NEUROPILOT_SDK_ROOT", str(library.stand_in().parent))
    artifact = write(Mish(), tmp_path, target="litert")
    with pytest.raises(VerificationError, match="GATHER 'mish'"):
        apu.compile_apu(tmp_path / artifact.path, tmp_path / "out.tflite", "mt6989")
    assert not (tmp_path / "out.tflite").exists()


# the whole package ----------------------------------------------------------------------------------------------------


def test_the_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(50, 3, 16, 16)
    qmodel = qat.prepare(model, (x[:1],), target=qat.load_target("apu"))
    qat.calibrate(qmodel, [x])
    made = qat.package(qmodel, "apu", tmp_path / "package", golden=2, io="codes")
    checks = {check.executor: check for check in made.manifest.checks}
    assert checks["litert"].status == "passed"
    assert checks["mediatek-legalization"].status == ("recorded" if _MISSING is None else "not run")
    assert checks["mediatek-legalization"].samples == 0
    assert "QAT_APU_SOCS names no SoC" in made.manifest.omitted["compiled/"]
    assert (tmp_path / "package/deploy.sh").stat().st_mode & 0o111
    assert {"deploy.sh", "deploy/contents.tsv"} <= set(made.manifest.files)
    if _MISSING is None:
        assert made.manifest.standing == "verified"
    assert qat.verify_package(tmp_path / "package").standing == made.manifest.standing


@needs_plugin
def test_a_package_with_compiled_files_is_verified_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROPILOT_SDK_ROOT", str(library.stand_in().parent))
    monkeypatch.setenv("QAT_APU_SOCS", "mt6989, mt1")
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(50, 3, 16, 16)
    qmodel = qat.prepare(model, (x[:1],), target=qat.load_target("apu"))
    qat.calibrate(qmodel, [x])
    made = qat.package(qmodel, "apu", tmp_path / "package", golden=1)
    assert [a.path for a in made.manifest.artifacts] == ["model.tflite", "compiled/mt6989/model.tflite"]
    assert made.manifest.artifacts[1].options == (("soc_model", "mt6989"),)
    assert "does not know 'mt1'" in made.manifest.omitted["compiled/mt1/model.tflite"]
    assert made.manifest.standing == "partly verified"
    assert "nothing has executed it" in (tmp_path / "package/README.md").read_text()
