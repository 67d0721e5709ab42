"""Builds fuzz_plan.cpp with sanitizers and feeds it plans; see scripts/fuzz_plan."""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from runtime_cases import CASES, convolution, fixed_point, layers, operator_plan
from runtime_networks import attention, chain

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
# the kernels' sums wrap around, as the compiler options of the extension say
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fwrapv", "-O1", "-g"]


def plans() -> dict[str, bytes]:
    """Valid plans that have every operator between them."""
    found = {name.replace(" ", "_"): convolution(layer) for name, layer in layers().items()}
    found |= {name: operator_plan(name) for name in CASES}
    found |= {"chain": chain(), "attention": attention()}
    return found | {f"fixed_point{i}": fixed_point(i == 1)[0] for i in (1, 2)}


def build(folder: Path, compiler: str = "g++") -> Path:
    """Compile the fuzzer."""
    with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    sources = [*CSRC.glob("kernels/integer/*.cpp"), *CSRC.glob("runtime/*.cpp")]
    sources.append(Path(__file__).with_name("fuzz_plan.cpp"))
    x86 = platform.machine() in {"x86_64", "AMD64"}

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        options = setup["KERNEL_OPTIONS"].get(source.stem, []) if x86 else []
        common = [option for option in setup["COMMON"] if option not in {"-O3", "-g0"}]
        subprocess.run([compiler, *common, *SANITIZED, *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "fuzz_plan"
    subprocess.run([compiler, *SANITIZED, "-pthread", *objects, "-o", program], check=True)
    return program


def run(program: Path, folder: Path, count: int, seed: int) -> str:
    """Run the fuzzer on `count` inputs and return its summary; an error of a sanitizer raises."""
    torch.manual_seed(0)
    files = []
    for name, plan in sorted(plans().items()):
        files.append(folder / f"{name}.plan")
        files[-1].write_bytes(plan)
    # an allocation that is too large is one of the answers
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=1024"}
    command = [program, str(count), str(seed), *files]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the program, its plans and its last input are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(run(build(folder), folder, options.count, options.seed))


if __name__ == "__main__":
    main()
