"""Which path is in use: chosen by what was built and by the environment, with a reason, and never a failed import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat import native
from qat.native.loading import load

ROOT = Path(__file__).resolve().parents[2]
STATUS = """
import dataclasses, json, sys
import qat.native
early = "qat::_interface" in __import__("torch")._C._dispatch_get_all_op_names()
status = qat.native.status()
print(json.dumps([status.active, status.reason, status.isa, str(status), early]))
"""


def status_in(environment: dict[str, str]) -> tuple[bool, str, str, str, bool]:
    """The status in a fresh process, and whether the import alone had loaded the operators."""
    done = subprocess.run(
        [sys.executable, "-c", STATUS], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found[0], found[1], found[2], found[3], found[4]


def test_the_environment_keeps_it_out() -> None:
    active, reason, isa, line, _ = status_in({"QAT_NO_NATIVE": "1"})
    assert (active, reason, isa) == (False, "QAT_NO_NATIVE is set", "")
    assert line == "not used: QAT_NO_NATIVE is set"


def test_the_environment_chooses_the_instruction_set(operators: None) -> None:
    active, _, isa, line, early = status_in({"QAT_NATIVE_ISA": "portable", "QAT_NO_NATIVE": "0"})
    assert (active, isa, early) == (True, "portable", False)
    assert line.startswith("portable (")


def test_an_unknown_instruction_set_is_a_reason(operators: None) -> None:
    active, reason, *_ = status_in({"QAT_NATIVE_ISA": "sse9"})
    assert not active
    assert "QAT_NATIVE_ISA names an instruction set" in reason


def test_the_best_instruction_set_is_the_default(operators: None) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    _, _, isa, *_ = status_in({"QAT_NATIVE_ISA": ""})
    expected = {"AVX512": "avx512", "AVX2": "avx2"}
    # torch itself can be held back by ATEN_CPU_CAPABILITY
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        assert isa == expected.get(capability, "portable")


def test_an_unknown_name_leaves_the_selection(operators: None) -> None:
    before = torch.ops.qat._isa()
    with pytest.raises(RuntimeError, match="'neon9' is unknown"):
        torch.ops.qat._use_isa("neon9")
    assert torch.ops.qat._isa() == before


@pytest.mark.parametrize(
    ("active", "cuda", "devices"), [(False, False, ""), (True, False, "cpu"), (True, True, "cpu cuda")]
)
def test_it_runs_on_the_devices_that_have_kernels(active: bool, cuda: bool, devices: str) -> None:
    status = native.Status(active, "", cuda=cuda)
    runs = {name for name in ("cpu", "cuda", "meta", "mps") if status.runs_on(torch.device(name))}
    assert runs == set(devices.split())


def test_an_absent_and_a_broken_library_are_reasons(tmp_path: Path) -> None:
    absent = load(tmp_path / "_C.abi3.so")
    assert not absent.active
    assert "was not built" in absent.reason
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF no library")
    found = load(broken)
    assert not found.active
    assert "broken.so does not load" in found.reason
    assert "\n" not in found.reason


@pytest.mark.skipif(os.environ.get("QAT_NO_NATIVE", "0") not in {"", "0"}, reason="QAT_NO_NATIVE is set")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_it_is_in_use() -> None:
    """Else a build that fails would only be seen as skipped tests."""
    assert native.status().active, f"{native.status().reason}: scripts/setup builds it"


def test_the_status_says_what_is_loaded(operators: None) -> None:
    status = native.status()
    assert status.path is not None
    assert status.path.is_file()
    assert status.isa in {"portable", "avx2", "avx512"}
    assert native.status() is status


def build(tmp_path: Path, **environment: str) -> tuple[list[Path], str]:
    """What `setup.py build_ext` makes of a copy of the sources, and what it says."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "made"],
        cwd=tmp_path, env={**os.environ, "QAT_NO_NATIVE": "", **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted((tmp_path / "made").rglob("*.so")), done.stderr


def test_without_a_compiler_the_installation_goes_on_with_a_warning(tmp_path: Path) -> None:
    made, said = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert made == []
    assert "warning: qat's native extension was not built" in said
    assert "no-such-compiler" in said


def test_the_build_is_left_out_on_demand(tmp_path: Path) -> None:
    made, said = build(tmp_path, QAT_NO_NATIVE="1", CXX="no-such-compiler", CC="no-such-compiler")
    assert made == []
    assert "warning: qat's native" not in said
