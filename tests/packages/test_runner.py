"""Plans for devices: written whole, run in this process, and by qat_run in the four I/O modes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runner_cases import (
    Net,
    Program,
    check_arrays,
    check_usage,
    converted,
    images,
    laid,
    linked_program,
    refused,
    same,
    samples_of,
)
from torch import Tensor, nn

from qat.errors import ExportError, VerificationError
from qat.export.contract import TensorContract
from qat.export.io_mode import Border, IoMode
from qat.integer.kernels.qparams import QParams
from qat.integer.model import IntegerModel
from qat.integer.native.planfile import Grid, Kind, PlanFile, PlanOp, PlanTensor, Type
from qat.native import runner as native
from qat.packages import runner
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native runner: {native.status().reason}")

BORDERS: tuple[Border, ...] = ("float", "codes")
MODES = [IoMode(a, b) for a, b in itertools.product(BORDERS, BORDERS)]


@pytest.fixture(scope="module")
def imodel() -> IntegerModel:
    torch.manual_seed(0)
    return converted(Net(), images())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return linked_program(tmp_path_factory.mktemp("program"))


def executor(name: str) -> Executor:
    return next(e for e in runner.runner_executors() if e.name == name)


@pytest.mark.parametrize("io", MODES, ids=lambda io: f"{io.inputs}-{io.outputs}")
def test_a_plan_gives_the_codes_of_the_simulation(imodel: IntegerModel, io: IoMode, tmp_path: Path) -> None:
    artifact = runner.write_plan(imodel, tmp_path, io)
    assert (artifact.path, artifact.format, artifact.numerics) == ("model.qatplan", "plan", "onnx")
    given, expected = samples_of(artifact, imodel, images(1, 1), images(3, 2))
    here = executor("runner-native")
    assert here.accepts(artifact)
    assert here.missing() is None
    found, notes = here.run(tmp_path / artifact.path, artifact, given)
    same(found, expected)
    assert notes == (f"instruction set {native.isa()}",)


def test_what_a_plan_promises(imodel: IntegerModel, tmp_path: Path) -> None:
    floats = runner.write_plan(imodel, tmp_path, name="a.qatplan")
    codes = runner.write_plan(imodel, tmp_path, IoMode("codes", "codes"), name="b.qatplan", batch=2)
    (image,), (scores, map_) = floats.inputs, floats.outputs
    # the user's own names, of floats too
    assert [c.name for c in (image, scores, map_)] == [c.tensor for c in (image, scores, map_)]
    assert (image.tensor, image.dtype, image.shape, image.order) == ("image", "float32", (-1, 3, 17, 14), (0, 1, 2, 3))
    assert (scores.dtype, scores.shape, map_.shape) == ("float32", (-1, 10), (-1, 16, 9, 7))
    encoding = imodel.program.encoding_of("image")
    assert encoding is not None
    assert (image.scale, image.zero_point, image.code_dtype) == (encoding.scale[0], encoding.zero_point[0], "uint8")
    (image,), (scores, map_) = codes.inputs, codes.outputs
    assert (image.dtype, image.shape, image.order) == ("uint8", (2, 17, 14, 3), (0, 2, 3, 1))
    assert (scores.shape, map_.shape, map_.order) == ((2, 10), (2, 9, 7, 16), (0, 2, 3, 1))
    # as the file says
    network = native.Network((tmp_path / "b.qatplan").read_bytes())
    assert [b.sizes for side in network.borders() for b in side] == [c.shape for c in (image, scores, map_)]


def test_the_same_bytes_every_time(imodel: IntegerModel, tmp_path: Path) -> None:
    files = [tmp_path / runner.write_plan(imodel, tmp_path, name=name).path for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_constants_are_those_of_the_model(imodel: IntegerModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    changed = converted(Net(), images())
    state = {key: value.clone() for key, value in changed.state_dict().items()}
    key = next(key for key in state if key.endswith("head/weight"))
    state[key] = torch.zeros_like(state[key])
    changed.load_state_dict(state)
    artifact = runner.write_plan(changed, tmp_path)
    given, expected = samples_of(artifact, changed, images(1, 1))
    same(executor("runner-native").run(tmp_path / artifact.path, artifact, given)[0], expected)
    assert len(np.unique(expected[0][artifact.outputs[0].name])) > 1
    before, _ = samples_of(artifact, imodel, images(1, 1))
    assert before[0].keys() == given[0].keys()


class SingleValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.mean((1, 2, 3), keepdim=True) + y.abs().mean((1, 2, 3), keepdim=True)


def test_a_plan_whose_sums_depend_on_the_batch_is_for_one_sample(tmp_path: Path) -> None:
    model = converted(SingleValues(), images())
    artifact = runner.write_plan(model, tmp_path)
    assert artifact.inputs[0].shape[0] == 1
    given, expected = samples_of(artifact, model, images(1, 1), images(1, 2))
    same(executor("runner-native").run(tmp_path / artifact.path, artifact, given)[0], expected)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, 3)
        self.flat = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.volume(x).mean((2, 3, 4)))


def test_operators_that_the_runner_lacks_are_named(tmp_path: Path) -> None:
    model = converted(Volume(), torch.randn(2, 1, 5, 5, 5))
    with pytest.raises(
        ExportError, match=r"the runner lacks 1 operators: volume \(.*3 spatial dimensions\); use the ONNX"
    ):
        runner.write_plan(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


class FloatEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


def test_codes_of_a_float(tmp_path: Path) -> None:
    model = converted(FloatEnd(), images())
    artifact = runner.write_plan(model, tmp_path)
    given, expected = samples_of(artifact, model, images(2, 1))
    same(executor("runner-native").run(tmp_path / artifact.path, artifact, given)[0], expected)
    with pytest.raises(ExportError, match="'x' is read as float, or on several grids; give floats there"):
        runner.write_plan(model, tmp_path, IoMode("codes", "float"))
    with pytest.raises(ExportError, match=r"'x.*' is not quantized and has no codes; take floats there"):
        runner.write_plan(model, tmp_path, IoMode("float", "codes"))


def test_another_profile(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ExportError, match="a plan is of the numerics profile 'onnx', not 'tflite'"):
        runner.write_plan(converted(Net(), images(), numerics="tflite"), tmp_path)


def test_samples_that_the_plan_does_not_take(imodel: IntegerModel, tmp_path: Path) -> None:
    """What a manifest promises is not believed: the library would read and write beyond the arrays."""
    artifact = runner.write_plan(imodel, tmp_path)
    name = artifact.inputs[0].name
    here, file = executor("runner-native"), tmp_path / artifact.path
    for sample, words in (
        ({name: np.zeros((1, 3, 2, 2), np.float32)}, "another shape"),
        ({name: np.zeros((1, 3, 17), np.float32)}, "another shape"),
        ({name: np.zeros((1, 3, 17, 14), np.uint8)}, "takes torch.float32"),
        ({"other": np.zeros((1, 3, 17, 14), np.float32)}, "there is no sample"),
    ):
        with pytest.raises(ExportError, match=words):
            here.run(file, artifact, [sample])


def test_a_processor_that_chooses_another_instruction_set(
    imodel: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = runner.write_plan(imodel, tmp_path)
    monkeypatch.setattr(runner, "build_runner", lambda machine: tmp_path)
    monkeypatch.setattr(runner, "execute", lambda command: "instruction set: neon\n")
    monkeypatch.setattr(runner, "np", _Files())
    with pytest.raises(VerificationError, match="the runner chose neon on a processor with i8mm"):
        executor("runner-max").run(tmp_path / artifact.path, artifact, [{artifact.inputs[0].name: np.zeros(1)}])


class _Files:
    """numpy's files, of which none is written."""

    ascontiguousarray = staticmethod(np.ascontiguousarray)
    save = load = staticmethod(lambda *args, **kwargs: None)


# -- qat_run


def arrays(folder: Path, artifact: Artifact, imodel: IntegerModel, count: int) -> tuple[dict[Border, Path], Tensor]:
    """The same images as floats and as codes, in files."""
    x = images(count, 5)
    contract = artifact.inputs[0]
    assert contract.scale is not None
    codes = laid(qat_codes(contract), x)
    # floats that lie on the grid, so that both are the same input
    floats = ((codes.astype(np.float32) - contract.zero_point) * np.float32(contract.scale)).astype(np.float32)
    np.save(folder / "float.npy", floats)
    np.save(folder / "codes.npy", codes)
    back = [contract.order.index(d) for d in range(4)]
    return {"float": folder / "float.npy", "codes": folder / "codes.npy"}, torch.from_numpy(floats).permute(back)


def qat_codes(contract: TensorContract) -> TensorContract:
    return replace(contract, dtype=contract.code_dtype)


@pytest.mark.parametrize("io", [MODES[0], MODES[3]], ids=["float plan", "plan of codes"])
def test_four_ways_in_and_out(imodel: IntegerModel, program: Program, io: IoMode, tmp_path: Path) -> None:
    artifact = runner.write_plan(imodel, tmp_path, io)
    files, x = arrays(tmp_path, artifact, imodel, 2)
    expected = imodel.run((x,))
    for given, taken in itertools.product(BORDERS, BORDERS):
        words = ["--input", str(files[given]), f"--input-type={given}", "--output-type", taken]
        names = [contract.name for contract in artifact.outputs]
        done = program("model.qatplan", *words, "--output", f"{names[1]}=b.npy", "--output", "a.npy", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for contract, entry, file in zip(artifact.outputs, imodel.program.outputs, ("a.npy", "b.npy"), strict=True):
            wanted = qat_codes(contract) if taken == "codes" else contract
            if taken == "float":
                assert np.array_equal(np.load(tmp_path / file), expected[entry].permute(contract.order).numpy())
            else:
                found = np.load(tmp_path / file)
                assert found.dtype == wanted.dtype
                assert np.array_equal(found, laid(wanted, expected[entry]))


def test_many_samples_plain_bytes_times_and_threads(imodel: IntegerModel, program: Program, tmp_path: Path) -> None:
    artifact = runner.write_plan(imodel, tmp_path, IoMode("float", "codes"))
    given, expected = samples_of(artifact, imodel, images(1, 1), images(3, 2), images(1, 3))
    for number, sample in enumerate(given):
        sample[artifact.inputs[0].name].tofile(tmp_path / f"x{number}.raw")
    outputs = ["--output", "y{}.npy", "--output", "z{}.raw"]
    done = program(
        "model.qatplan", "--input", "x{}.raw", *outputs, "--samples", "3", "--repeat", "2", "--profile", "--info",
        "--threads", "2", "--isa", "portable", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number, sample in enumerate(expected):
        scores, map_ = sample.values()
        assert np.array_equal(np.load(tmp_path / f"y{number}.npy"), scores)
        assert np.array_equal(np.fromfile(tmp_path / f"z{number}.raw", map_.dtype), map_.flatten())
    lines = done.stdout.splitlines()
    assert lines[0] == "instruction set: portable"
    contract = artifact.inputs[0]
    grid = f"codes u1, scale {np.float32(contract.scale):.9g}, zero point {contract.zero_point}, range [0, 255]"
    assert f"input: {contract.name}, f4, [batch, 3, 17, 14], {grid}" in lines
    assert any(line.startswith("time: min ") and line.endswith(", 6 runs") for line in lines)
    kinds = [line.split()[2] for line in lines if "%" in line]
    assert {"quantize", "conv", "mean"} <= set(kinds)


def test_help_and_information_need_no_input(imodel: IntegerModel, program: Program, tmp_path: Path) -> None:
    runner.write_plan(imodel, tmp_path)
    assert "--unchecked-isa" in program("--help", cwd=tmp_path).stdout
    done = program("model.qatplan", "--info", cwd=tmp_path)
    assert done.returncode == 0
    assert "memory: " in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("output: ")]) == 2


def test_wrong_usage(imodel: IntegerModel, program: Program, tmp_path: Path) -> None:
    # of the others see test_emulated_arm.py: this program takes half a second to start
    check_usage(program, imodel, tmp_path, every=3)


def test_damaged_plans(imodel: IntegerModel, program: Program, tmp_path: Path) -> None:
    plan = (tmp_path / runner.write_plan(imodel, tmp_path).path).read_bytes()
    for content, cause in (
        (plan[:-9], f"plan: has {len(plan) - 9} of {len(plan)} bytes"),
        (plan[:-1] + bytes([plan[-1] ^ 1]), "the checksum is wrong"),
        (b"", "do not begin as a plan does"),
    ):
        (tmp_path / "bad.qatplan").write_bytes(content)
        refused(program, tmp_path, "bad.qatplan", "--info", cause=cause)


def test_arrays_that_do_not_fit(imodel: IntegerModel, program: Program, tmp_path: Path) -> None:
    check_arrays(program, imodel, tmp_path, every=3)


def test_codes_outside_of_the_range(program: Program, tmp_path: Path) -> None:
    x = QParams(0.1, 3, 0, 100)
    artifact = tmp_path / "a.qatplan"
    plan = PlanFile(
        (PlanTensor("x", Type.U8, (-1, 5), grid(x)), PlanTensor("y", Type.U8, (-1, 5), grid(x))),
        (),
        (PlanOp(Kind.RESHAPE, "r", ("x",), "y"),),
        ("x",),
        ("y",),
    )
    artifact.write_bytes(plan.to_bytes())
    np.save(tmp_path / "x.npy", np.array([[0, 1, 2, 3, 101]], np.uint8))
    refused(program, tmp_path, "a.qatplan", "--input", "x.npy", cause="has codes outside of [0, 100]; quantize it to")
    np.save(tmp_path / "x.npy", np.array([[0, 1, 2, 3, 100]], np.uint8))
    assert program("a.qatplan", "--input", "x.npy", cwd=tmp_path).returncode == 0


def grid(q: QParams) -> Grid:
    return Grid(q.scale, q.zero_point, q.qmin, q.qmax, q.wide)
