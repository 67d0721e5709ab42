"""The kernels of ARM under emulation, and those of x86, against the portable ones: one program, cross-compiled.

`kernel_cases` runs the same seeded cases of every operator on any processor and prints a hash of the codes of each.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "kernels"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
#: The best instruction set of the integer kernels on a processor without, with one and with both extensions.
PROCESSORS = {"cortex-a53": "neon", "neoverse-n1": "neondot", "max": "i8mm"}
CASES = "25"
pytestmark = pytest.mark.heavy


def build(compiler: str, machine: str, folder: Path) -> Path:
    """Compile the program for a machine."""
    with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    options = setup["kernel_options"](machine)
    sources = [*KERNELS.glob("*.cpp"), *KERNELS.glob("integer/*.cpp"), *Path(__file__).parent.glob("kernel_cases*.cpp")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = [*setup["COMMON"], "-Werror", *options.get(source.stem, []), f"-I{KERNELS}", f"-I{KERNELS / 'integer'}"]
        subprocess.run([compiler, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernel_cases"
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in (CROSS, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}; scripts/setup --system installs it")
    return build(CROSS, "aarch64", tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    return build(compiler, platform.machine(), tmp_path_factory.mktemp("host"))


def emulated(program: Path, processor: str, *arguments: str) -> list[str]:
    return [EMULATOR, "-cpu", processor, str(program), *arguments]


def hashes(command: list[str]) -> dict[str, str]:
    """The hash of every case, by operator and number."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def expected(host: Path) -> dict[str, str]:
    """Hashes of the portable kernels here."""
    found = hashes([str(host), "run", "portable", CASES])
    operators = {name.split()[0] for name in found}
    assert len(operators) == 19
    assert len(found) == 19 * int(CASES)
    return found


def same(found: dict[str, str], expected: dict[str, str]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if value != expected[name]] == []


def test_the_portable_kernels_compute_the_same_on_arm(arm: Path, expected: dict[str, str]) -> None:
    same(hashes(emulated(arm, "cortex-a53", "run", "portable", CASES)), expected)


@pytest.mark.parametrize(("processor", "isa"), PROCESSORS.items())
def test_every_instruction_set_of_arm_gives_the_codes_of_the_portable_kernels(
    arm: Path, expected: dict[str, str], processor: str, isa: str
) -> None:
    same(hashes(emulated(arm, processor, "run", isa, CASES)), expected)


@pytest.mark.parametrize("isa", ["avx2", "avxvnni", "avx512vnni"])
def test_every_instruction_set_of_this_processor_gives_the_codes_of_the_portable_kernels(
    host: Path, expected: dict[str, str], isa: str
) -> None:
    command = [str(host), "run", isa, CASES]
    if subprocess.run([*command[:-1], "0"], check=False, capture_output=True).returncode == 4:
        pytest.skip(f"this processor has no {isa}")
    same(hashes(command), expected)


@pytest.mark.parametrize(("processor", "isa"), PROCESSORS.items())
def test_the_best_instruction_set_that_the_processor_has_is_taken(arm: Path, processor: str, isa: str) -> None:
    done = subprocess.run(emulated(arm, processor, "best"), check=True, capture_output=True, text=True)
    assert done.stdout.split() == [isa, "neon"]


@pytest.mark.parametrize(("processor", "isa"), [("cortex-a53", "neondot"), ("neoverse-n1", "i8mm")])
def test_a_wrong_choice_would_be_fatal(arm: Path, processor: str, isa: str) -> None:
    # so the emulated processors do lack the instructions, and the tests above tell that the dispatch asks
    forced = subprocess.run(emulated(arm, processor, "force", isa), check=False, capture_output=True)
    assert forced.returncode in {-signal.SIGILL, 128 + signal.SIGILL}
    refused = subprocess.run(emulated(arm, processor, "run", isa, "1"), check=False, capture_output=True, text=True)
    assert refused.returncode == 4
    assert isa in refused.stderr
    assert subprocess.run(emulated(arm, "max", "force", isa), check=True, capture_output=True).stdout
