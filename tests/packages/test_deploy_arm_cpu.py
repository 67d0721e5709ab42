"""The deploy script for ARM CPUs, and how answers are compared."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_cases import ARM, CPU, PLAN, SHELLS, X86, Phones, elf, in_script, make
from torch import nn

import qat
from qat.packages.deploy.write import write_deploy
from qat.packages.golden import golden_samples, write_golden


@pytest.fixture
def phones(tmp_path: Path) -> Phones:
    return Phones(tmp_path / "drawer")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for ARM CPUs, with something that looks like a runner."""
    return make(tmp_path_factory.mktemp("arm"), "arm-cpu", PLAN, runner=elf(ARM))


# comparing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("dtype", "expected", "found", "bound", "said"),
    [
        ("int8", [1, -128, 127], [1, -128, 127], 0, "equal, 3 bytes"),
        ("int8", [1, -128, 127], [1, -127, 127], 0, "WRONG: 1 of 3 differ, by up to 1 codes"),
        ("int8", [1, -128, 127], [1, -128, 126], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("int8", [1, -128, 127], [127, 127, 127], 1, "WRONG: 2 of 3 differ, by up to 255 codes"),
        ("int8", [1, 2, 3], [1, 2], 9, "WRONG: 2 bytes in place of 3"),
        ("int8", [1, 2, 3], [1, 2, 9], "-", "1 of 3 differ, by up to 6 codes (recorded; no bound is known)"),
        ("uint8", [0, 128, 255], [0, 127, 254], 1, "2 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("uint16", [0, 40000, 65535], [0, 40200, 65535], 1, "1 of 3 differ, by up to 200 codes (allowed: 256)"),
        ("int16", [0, -20000, 9], [300, -20000, 9], 1, "WRONG: 1 of 3 differ, by up to 300 codes"),
        ("int32", [0, -(1 << 31), 9], [0, -(1 << 31), 8], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("float32", [1e-3, -2.5, 3], [1e-3, -2.0, 3], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("float32", [1e-3, -2.5, 3], [1e-3, -1.5, 3], 1, "WRONG: 1 of 3 differ, by up to 2 codes"),
        ("float32", [1, 2, 3], [1, 2, float("nan")], 1, "WRONG: 1 of 3 differ, by up to 1e+30 codes"),
        ("float32", [1, 2, 3], [1, 2, float("inf")], 1, "WRONG: 1 of 3 differ, by up to "),
        ("float32", [1, float("nan"), 3], [1, 2, 3], 1, "WRONG: 1 of 3 differ, by up to 1e+30 codes"),
        ("complex64", [1, 2, 3], [1, 2, 4], 1, None),
    ],
)
def test_answers_are_compared_in_codes(
    shell: str,
    dtype: str,
    expected: list[float],
    found: list[float],
    bound: int | str,
    said: str | None,
    arm: Path,
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "expected.npy", np.asarray(expected, dtype))
    np.asarray(found, dtype).tofile(tmp_path / "found")
    commands = f'cd {tmp_path}; compare y expected.npy found {dtype} 0.5 {bound}; echo "verdict $VERDICT"'
    if said is None:
        with pytest.raises(AssertionError, match="y is of type complex64, which cannot be compared"):
            in_script(arm, tmp_path, commands, shell)
        return
    told = in_script(arm, tmp_path, commands, shell).splitlines()
    assert told[0].startswith(f"output y: {said}")
    assert told[1] == ("verdict failed" if said.startswith("WRONG") else "verdict ")


def test_a_long_header_of_an_array_is_skipped(arm: Path, tmp_path: Path) -> None:
    array = np.zeros(2, [("a" * 70000, "i1")])
    with (tmp_path / "long.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    (tmp_path / "found").write_bytes(bytes(2))
    assert "equal, 2 bytes" in in_script(arm, tmp_path, f"cd {tmp_path}; compare y long.npy found int8 1 0")


# ARM CPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("asimddp i8mm", "kernels: i8mm (i8mm is among"),
        ("asimddp", "kernels: dot product (asimddp is among"),
        ("", "kernels: plain NEON (neither"),
        (None, "note: /proc/cpuinfo lists no features"),
    ],
)
def test_kernels_are_reported(features: str | None, said: str, phones: Phones, arm: Path) -> None:
    phones.add(files={} if features is None else {"proc/cpuinfo": CPU.format(features)})
    assert said in phones.deploy(arm, "--dry-run").stdout


def test_runners(phones: Phones, arm: Path, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN)
    assert "has no built runner; build it as README.md says, and set QAT_RUN" in phones.deploy(package).stderr
    assert "there is no runner /no/runner" in phones.deploy(package, QAT_RUN="/no/runner").stderr
    foreign = tmp_path / "qat_run"
    foreign.write_bytes(elf(X86))
    assert f"the runner {foreign} is no program for arm64" in phones.deploy(arm, QAT_RUN=str(foreign)).stderr
    foreign.write_text("#!/bin/sh\n")
    assert "is no program for arm64" in phones.deploy(arm, QAT_RUN=str(foreign)).stderr
    foreign.write_bytes(elf(ARM, "mine"))
    done = phones.deploy(package, QAT_RUN=str(foreign))
    assert f"runner: {foreign} (QAT_RUN names it)" in done.stdout
    assert phones.pushed()["qat_run.arm64"].endswith(b"mine")


def test_a_package_without_plan(phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", [("model.onnx", "onnx", ())])
    assert "has no plan for the native runner; use model.onnx or model.tflite" in phones.deploy(package).stderr


# what runs under qemu -------------------------------------------------------------------------------------------------

RUNNER = r"""
#include <stdio.h>
#include <string.h>
/* answers x + STEP for int8 arrays, as qat_run's command line has it */
int main(int count, char** words) {
    const char *in = NULL, *out = NULL;
    for (int i = 2; i + 1 < count; ++i) {
        if (!strcmp(words[i], "--input")) in = words[++i];
        else if (!strcmp(words[i], "--output")) out = words[++i];
        else if (!strcmp(words[i], "--repeat")) printf("median 1.0 ms of %s\n", words[++i]);
    }
#ifdef ILLEGAL
    __asm__ volatile(".inst 0x00000000");
#endif
    FILE *from = fopen(in, "rb"), *to = fopen(out, "wb");
    if (!from || !to) return 2;
    for (int c, n = 0; (c = getc(from)) != EOF; ++n) putc(n < 128 ? c : c + STEP, to);
    return fclose(to) ? 1 : 0;
}
"""
_TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
needs_arm = pytest.mark.skipif(
    not all(map(shutil.which, _TOOLS)), reason=f"needs {' and '.join(_TOOLS)}: scripts/setup --system"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    folder = tmp_path_factory.mktemp("runner")

    def build(*options: str) -> bytes:
        (folder / "run.c").write_text(RUNNER)
        words = ["aarch64-linux-gnu-gcc", "-static", "-O1", *options, "run.c", "-o", "run"]
        subprocess.run(words, cwd=folder, check=True)
        return (folder / "run").read_bytes()

    return build


@needs_arm
@pytest.mark.parametrize("shell", SHELLS)
def test_answers_that_are_expected(shell: str, runner: Callable[..., bytes], phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=1"))
    done = phones.deploy(package, "--run", shell=shell)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "output y 'z of sample 000: equal, 6 bytes" in done.stdout
    assert "output y 'z of sample 001: equal, 6 bytes" in done.stdout
    assert "  median 1.0 ms of 20" in done.stdout


@needs_arm
@pytest.mark.heavy
def test_the_native_runner_on_three_processors(phones: Phones, tmp_path: Path) -> None:
    runners = pytest.importorskip("qat.packages.runner", reason="needs the native runner")
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)),
        torch.randn(50, 3, 16, 16),
    )
    qmodel = qat.prepare(model.eval(), (x[:1],), target=qat.load_target("arm-cpu"))
    qat.calibrate(qmodel, [x])
    imodel = qat.convert(qmodel)
    artifact = runners.write_plan(imodel, tmp_path, qat.IoMode("codes", "codes"))
    batches = [(x[:1],), (x[1:2],)]
    write_golden(tmp_path, artifact, *golden_samples(imodel, artifact, batches))
    shutil.copyfile(runners.build_runner(), tmp_path / "qat_run")
    write_deploy(tmp_path, "arm-cpu", "net", [artifact], len(batches))
    phones.add()
    for processor, chosen in (("cortex-a53", "neon"), ("neoverse-n1", "neondot"), ("max", "i8mm")):
        done = phones.deploy(tmp_path, "--run", FAKE_CPU=processor)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert f"instruction set: {chosen}\n" in done.stdout
        assert done.stdout.count(": equal, 10 bytes") == 2


@needs_arm
def test_answers_that_are_not_expected(runner: Callable[..., bytes], phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=4"))
    done = phones.deploy(package, "--run", "--json")
    assert done.returncode == 1
    assert "output y 'z of sample 000: WRONG: 6 of 6 differ, by up to 3 codes" in done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 1
    assert [o["output"] for o in told["outputs"]] == ["y 'z of sample 000", "y 'z of sample 001"]


@needs_arm
def test_an_illegal_instruction_is_told_from_other_ends(
    runner: Callable[..., bytes], phones: Phones, tmp_path: Path
) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=1", "-DILLEGAL"))
    done = phones.deploy(package, "--run")
    assert done.returncode == 1
    assert "the runner ended with status 132 (illegal instruction: kernels were chosen that this" in done.stdout
