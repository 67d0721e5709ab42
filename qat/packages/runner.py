"""The plan of `qat_run`, the runner for devices, and the runner under emulation as an executor."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from qat.errors import ExportError, VerificationError
from qat.export.contract import contract, input_encoding, output_encoding
from qat.export.io_mode import IoMode
from qat.files import atomic_write_bytes
from qat.integer.model import IntegerModel
from qat.integer.native.builder import Value
from qat.integer.native.whole import lower_whole
from qat.integer.program import Program
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor, Missing, Run, Sample
from qat.packages.sources import AARCH64, RUNNER, Machine, build_runner, missing_tools, sources_folder, sources_hash, this_machine

PLAN = "model.qatplan"
_EMULATOR = "qemu-aarch64-static"
#: emulated processors, and the best instruction set that the runner has for each
PROCESSORS = {"cortex-a53": "neon", "neoverse-n1": "neondot", "max": "i8mm"}


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
        batch: Batch size, or None for an open one. The few networks whose sums depend on it (additions of single values)
            get a plan for batch size 1.

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
    """Return the executors of plans: `qat_run` on three emulated ARM processors, and on this machine.

    Each is built of the sources of this installation; where the package has others, a note says so. The bound is 0:
    the instruction sets must agree in every code.
    """
    emulated = [
        _executor(f"runner-{processor}", AARCH64, [_EMULATOR, "-cpu", processor], isa, f"{_EMULATOR} as {processor}")
        for processor, isa in PROCESSORS.items()
    ]
    here = this_machine()
    return (*emulated, _executor("runner-native", here, [], "", here.name))


def _executor(name: str, machine: Machine, prefix: list[str], isa: str, where: str) -> Executor:
    return Executor(
        name=name,
        accepts=lambda artifact: artifact.format == "plan",
        runtime=lambda: f"qat_run, {where}",
        missing=lambda: _missing(machine, prefix),
        run=_run_plan(machine, prefix, isa),
    )


def _missing(machine: Machine, prefix: list[str]) -> Missing | None:
    if prefix and shutil.which(prefix[0]) is None:
        return Missing(f"{prefix[0]}, to run ARM programs", "scripts/setup --system, or as root: apt-get install qemu-user-static")
    return missing_tools(machine)


def _run_plan(machine: Machine, prefix: list[str], isa: str) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        program = build_runner(machine)
        with tempfile.TemporaryDirectory(prefix="qat-plan-") as name:
            folder = Path(name)
            words = [f"--samples={len(samples)}"]
            for index, given in enumerate(artifact.inputs):
                words.append(f"--input={given.name}={folder / f'i{index}_{{}}.npy'}")
                for number, sample in enumerate(samples):
                    np.save(folder / f"i{index}_{number}.npy", sample[given.name], allow_pickle=False)
            names = list(dict.fromkeys(c.name for c in artifact.outputs))
            for index, output in enumerate(names):
                words.append(f"--output={output}={folder / f'o{index}_{{}}.npy'}")
            said = execute([*prefix, str(program), str(file), *words])
            found = [
                {output: np.load(folder / f"o{i}_{number}.npy", allow_pickle=False) for i, output in enumerate(names)}
                for number in range(len(samples))
            ]
        chosen = chosen_isa(said)
        if isa and chosen != isa:
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
