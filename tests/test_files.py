"""Files are written whole or not at all, and JSON is read strictly."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from qat.errors import DataError, OutputError
from qat.files import atomic_path, atomic_write_bytes, atomic_write_text, read_json


def test_writing_and_replacing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file.txt"
    atomic_write_text(path, "first: ä\n")
    assert path.read_bytes() == "first: ä\n".encode()
    atomic_write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def write_half(path: Path, failure: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise failure


@pytest.mark.parametrize("failure", [RuntimeError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_half_way_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_half(path, failure)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_half_way_of_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "file", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    # the limit on the size of a file makes a real write fail half-way
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*file \(File too large\); free some space"):
            atomic_write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*below \(.*\); choose a writable folder"):
        atomic_write_text(tmp_path / "file" / "below", "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"\(Permission denied\); choose a writable folder"):
            atomic_write_text(tmp_path / "file", "new")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "file").read_text() == "old"


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=r"\(Read-only file system\); choose a writable folder"):
        atomic_write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*folder .*; give the path of a file"):
        atomic_write_text(tmp_path / "folder", "text")
    with pytest.raises(OutputError, match=r"cannot write '\.'; give the path of a file"):
        atomic_write_text(Path(), "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_errors_of_other_files_are_not_taken_for_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    atomic_write_text(path, "text")
    assert path.read_text() == "text"


def test_reading_json(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"a": [1, 2.5, null, true, "ä"], "b": {"a": 1}}')
    assert read_json(path, DataError, "mend") == {"a": [1, 2.5, None, True, "ä"], "b": {"a": 1}}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[1, -Infinity]", "-Infinity is no JSON number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' occurs twice"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "integer string conversion"),
    ],
    ids=["empty", "truncated", "nan", "infinity", "twice", "no text", "deep", "huge"],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"file\.json is not JSON \(.*{cause}.*\); write it again") as caught:
        read_json(path, DataError, "write it again")
    assert "\n" not in str(caught.value)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(DataError, match=r"cannot read .* \(.+\); give an existing file"):
            read_json(path, DataError, "mend")
