"""The runner's sources in packages and wheels, and what is built of them."""

from __future__ import annotations

import os
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from qat.errors import OutputError, StateError
from qat.packages import sources

ROOT = Path(__file__).parents[2]
CMAKE = """#!{python}
import pathlib, sys
if "--build" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--build") + 1])
    (folder / "qat_run").write_text("a program")
    with open("{calls}", "a") as log:
        log.write("built\\n")
"""
COMPILER = """#!/bin/sh
echo "compiler {version}"
"""


def test_a_copy_is_complete(tmp_path: Path) -> None:
    folder = sources.copy_sources(tmp_path)
    assert folder == tmp_path / "runner"
    assert sources.sources_hash(folder) == sources.sources_hash(sources.sources_folder())
    files = {name for name, _ in sources.source_files(folder)}
    assert files == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"CMakeLists.txt", "runner/main.cpp", "runtime/qat_runtime.h", "kernels/integer/int8_i8mm.cpp"} <= files
    # nothing that is included is outside of it
    for name in files:
        if name.endswith((".cpp", ".h")):
            for included in re.findall(r'^#include "(.*)"', (folder / name).read_text(), re.MULTILINE):
                assert (folder / name).parent.joinpath(included).resolve().is_relative_to(folder)
                assert (folder / name).parent.joinpath(included).is_file(), (name, included)


def test_wheels_have_what_packages_need() -> None:
    with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    listed = {path.relative_to(ROOT / "csrc").as_posix() for part in setup["RUNNER_SOURCES"]
              for path in (ROOT / "csrc").glob(part)}  # fmt: skip
    assert listed == {name for name, _ in sources.source_files(ROOT / "csrc")}


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = sources.copy_sources(tmp_path)
    before = sources.sources_hash(folder)
    main = folder / "runner" / "main.cpp"
    content = main.read_bytes()
    main.write_bytes(content + b"\n")
    changed = sources.sources_hash(folder)
    main.write_bytes(content)
    main.rename(folder / "runner" / "other.cpp")
    assert len({before, changed, sources.sources_hash(folder)}) == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runner").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*runner.*; choose a writable folder"):
        sources.copy_sources(tmp_path)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler and a CMake that only say that they were called; a cache of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("cmake", CMAKE.format(python=sys.executable, calls=tmp_path / "calls")),
        ("make", "#!/bin/sh\n"),
        ("aarch64-linux-gnu-g++", COMPILER.format(version=1)),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def calls(folder: Path) -> int:
    return (folder.parent / "calls").read_text().count("built")


def test_a_program_is_built_once_for_the_same_sources_and_compiler(tools: Path, tmp_path: Path) -> None:
    program = sources.build_runner()
    assert program.is_relative_to(tmp_path / "cache" / "qat" / "runner")
    assert os.access(program, os.X_OK)
    copy = sources.copy_sources(tmp_path)
    assert sources.build_runner(folder=copy) == sources.build_runner() == program
    assert calls(tools) == 1
    (copy / "runner" / "main.cpp").write_text("int main() {}")
    assert sources.build_runner(folder=copy) != program
    (tools / "aarch64-linux-gnu-g++").write_text(COMPILER.format(version=2))
    assert sources.build_runner() != program
    assert calls(tools) == 3


def test_the_program_in_a_package(tools: Path, tmp_path: Path) -> None:
    program = sources.copy_program(tmp_path)
    assert program == tmp_path / "runner" / "bin" / "aarch64-linux" / "qat_run"
    assert program.read_bytes() == sources.build_runner().read_bytes()
    assert os.access(program, os.X_OK)


def test_missing_tools_are_named(tools: Path) -> None:
    assert sources.missing_tools(sources.AARCH64) is None
    (tools / "aarch64-linux-gnu-g++").unlink()
    found = sources.missing_tools(sources.AARCH64)
    assert found is not None
    assert found.what == "aarch64-linux-gnu-g++, to build the runner"
    assert found.mend.endswith("apt-get install g++-aarch64-linux-gnu")
    with pytest.raises(StateError, match=r"not here: aarch64-linux-gnu-g\+\+, to build the runner; scripts/setup"):
        sources.build_runner()


def test_a_build_that_fails_says_why(tools: Path, tmp_path: Path) -> None:
    (tools / "cmake").write_text("#!/bin/sh\necho 'main.cpp:1: error: no such thing'\nexit 3\n")
    with pytest.raises(StateError, match=r"cmake -S .* failed: main.cpp:1: error: no such thing; see that"):
        sources.build_runner()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_a_cache_that_cannot_be_written(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*runner.*; set XDG_CACHE_HOME to a writable folder"):
        sources.build_runner()


def test_processes_that_need_the_same_program_build_it_once(tools: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: sources.build_runner(), range(4)))) == 1
    assert calls(tools) == 1


def test_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "qat" / "packages" / "sources.py"))
    with pytest.raises(StateError, match="the runner's sources are not installed"):
        sources.sources_folder()
    beside = tmp_path / "qat" / "packages" / "csrc"
    beside.mkdir(parents=True)
    (beside / "CMakeLists.txt").write_text("")
    assert sources.sources_folder() == beside
