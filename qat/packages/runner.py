"""The plan of `qat_run`, the runner for devices, and the runner as an executor, under emulation and here."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.errors import ExportError, VerificationError
from qat.export.contract import contract, input_encoding, output_encoding
from qat.export.io_mode import IoMode
from qat.files import atomic_write_bytes
from qat.integer.model import IntegerModel
from qat.integer.native.whole import lower_whole
from qat.integer.program import Program
from qat.native import runner
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor, Missing, Run, Sample
from qat.packages.sources import AARCH64, RUNNER, build_runner, missing_tools, sources_folder, sources_hash

PLAN = "model.qatplan"
_EMULATOR = "qemu-aarch64-static"
#: emulated processors, and the best instruction set that the runner has for each
PROCESSORS: Mapping[str, str] = {"cortex-a53": "neon", "neoverse-n1": "neondot", "max": "i8mm"}
#: emulation takes some hundred times as long as a processor: half a second for an image and mobilenet_v2
_SAMPLES = 4


def write_plan(
    model: IntegerModel | Program, folder: Path, io: IoMode | None = None, *, name: str = PLAN, batch: int | None = None
) -> Artifact:
    """Write a network as a plan for `qat_run`.

    Float borders are in the user's order of dimensions, codes are channels last where images are.

    Args:
        model: The converted network, of the numerics profile `onnx`.
        folder: Where to write.
        io: Whether the plan takes and gives floats or codes.
        name: Name of the file.
        batch: Batch size, or None for an open one. The few networks whose sums depend on it (additions of single
            values) get a plan for batch size 1.

    Returns:
        What the file promises.

    Raises:
        ExportError: The runner lacks operators, which are named with the cause; or codes are asked of a tensor that has
            none.
        OutputError: The file cannot be written.
    """
    mode = IoMode() if io is None else io
    program = model if isinstance(model, Program) else model.program
    constants = {key: constant.value for key, constant in program.constants.items()}
    if isinstance(model, IntegerModel):
        constants = model.constant_values()
    whole = lower_whole(
        program,
        constants,
        code_inputs=mode.inputs == "codes",
        code_outputs=mode.outputs == "codes",
        batch=batch,
    )
    inputs = tuple(
        contract(
            value.tensor, program.tensors[entry].public_name, input_encoding(program, entry), value.sizes, value.order,
            codes=mode.inputs == "codes",
        )
        for entry, value in zip(program.inputs, whole.inputs, strict=True)
    )  # fmt: skip
    outputs = tuple(
        contract(
            value.tensor, program.tensors[entry].public_name, output_encoding(program, entry), value.sizes, value.order,
            codes=mode.outputs == "codes",
        )
        for entry, value in zip(program.outputs, whole.outputs, strict=True)
    )  # fmt: skip
    atomic_write_bytes(Path(folder) / name, whole.plan.to_bytes())
    return Artifact(name, "plan", "onnx", inputs, outputs)


def runner_executors() -> tuple[Executor, ...]:
    """Return the executors of plans: `qat_run` on three emulated ARM processors, and the runner in this process.

    The program is built of the sources of this installation; where the package has others, a note says so. The bound is
    0: the instruction sets must agree in every code.
    """
    emulated = [
        Executor(
            name=f"runner-{processor}",
            accepts=lambda artifact: artifact.format == "plan",
            runtime=lambda processor=processor: f"qat_run, aarch64 ({_EMULATOR} as {processor})",  # type: ignore[misc]
            missing=_missing,
            run=_run_emulated(processor, isa),
            samples=_SAMPLES,
        )
        for processor, isa in PROCESSORS.items()
    ]
    native = Executor(
        name="runner-native",
        accepts=lambda artifact: artifact.format == "plan",
        runtime=lambda: f"qat's runner, {platform.machine()}",
        missing=lambda: (
            None
            if runner.status().active
            else Missing(f"the native extension ({runner.status().reason})", "scripts/setup")
        ),
        run=_run_here,
    )
    return (*emulated, native)


def _missing() -> Missing | None:
    if shutil.which(_EMULATOR) is None:
        mend = "scripts/setup --system, or as root: apt-get install qemu-user-static"
        return Missing(f"{_EMULATOR}, to run ARM programs", mend)
    return missing_tools(AARCH64)


def _run_here(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
    """Run a plan in this process."""
    network = runner.Network(Path(file).read_bytes())
    inputs, outputs = network.borders()
    found = []
    for sample in samples:
        # as the file has them: the library reads and writes as many elements as it says, whatever a manifest says
        given = [_tensor(border, sample) for border in inputs]
        batch = next((batch for border, x in zip(inputs, given, strict=True) if (batch := _batch(border, x))), 1)
        for border, x in zip(inputs, given, strict=True):
            if list(x.shape) != border.sizes_for(batch):
                raise ExportError(f"{border.name!r} of the plan has another shape than its sample", "make both again")
        results = [torch.empty(border.sizes_for(batch), dtype=border.dtype) for border in outputs]
        runner.Session(network, batch, torch.get_num_threads()).run(given, results)
        found.append({border.name: result.numpy() for border, result in zip(outputs, results, strict=True)})
    return found, (f"instruction set {runner.isa()}",)


def _tensor(border: runner.Border, sample: Sample) -> Tensor:
    if border.name not in sample:
        raise ExportError(f"there is no sample for {border.name!r} of the plan", "make both again")
    x = torch.from_numpy(np.array(sample[border.name], order="C"))
    if x.dtype != border.dtype:
        raise ExportError(
            f"{border.name!r} of the plan takes {border.dtype}, its sample is {x.dtype}", "make both again"
        )
    return x


def _batch(border: runner.Border, x: Tensor) -> int:
    """The batch size of an input, 0 where it has none."""
    return next((have // -size for size, have in zip(border.sizes, x.shape, strict=False) if size < 0), 0)


def _run_emulated(processor: str, isa: str) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        program = build_runner(AARCH64)
        with tempfile.TemporaryDirectory(prefix="qat-plan-") as name:
            folder = Path(name)
            words = [f"--samples={len(samples)}"]
            for index, given in enumerate(artifact.inputs):
                words.append(f"--input={given.name}={folder / f'i{index}_{{}}.npy'}")
                for number, sample in enumerate(samples):
                    array = np.ascontiguousarray(sample[given.name])
                    np.save(folder / f"i{index}_{number}.npy", array, allow_pickle=False)
            names = list(dict.fromkeys(c.name for c in artifact.outputs))
            for index, output in enumerate(names):
                words.append(f"--output={output}={folder / f'o{index}_{{}}.npy'}")
            said = execute([_EMULATOR, "-cpu", processor, str(program), str(file), *words])
            found = [
                {output: np.load(folder / f"o{i}_{number}.npy", allow_pickle=False) for i, output in enumerate(names)}
                for number in range(len(samples))
            ]
        chosen = chosen_isa(said)
        if chosen != isa:
            raise VerificationError(f"the runner chose {chosen} on a processor with {isa}", "report this")
        return found, (f"instruction set {chosen}", *_other_sources(file, artifact))

    return run


def execute(command: list[str]) -> str:
    """Run `qat_run` and return what it printed.

    Raises:
        ExportError: It ended with another status than 0; its own words are given, or the signal.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else "without a word"
        raise ExportError(f"qat_run ended with status {done.returncode}: {said}", "make the package again")
    return done.stdout


def chosen_isa(printed: str) -> str:
    """Return the instruction set that `qat_run` says it has taken."""
    found = re.search(r"^instruction set: (\S+)$", printed, re.MULTILINE)
    return found.group(1) if found else "unknown"


def _other_sources(file: Path, artifact: Artifact) -> tuple[str, ...]:
    """A note where the package has other sources than this installation."""
    root = file.parents[artifact.path.count("/")]
    packaged = root / RUNNER
    if not packaged.is_dir() or sources_hash(packaged) == sources_hash(sources_folder()):
        return ()
    return ("the sources in the package are of another version; the runner was built of this installation's",)
