"""What a training tells: TensorBoard, curves, and the lines they are made of."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from training_cases import blobs, small

import qat
from qat.errors import OutputError, StateError
from qat.train.board import Board, quantizer_scalars, summary_writer
from qat.train.curves import draw_curves
from qat.train.hooks import EpochRecord
from qat.train.log import StepRecord, TrainingLog, read_log
from qat.train.progress import duration
from qat.train.settings import OptimizerSettings, TrainSettings
from qat.train.trainer import fit


def test_without_the_package_tensorboard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(StateError, match=r"needs the package tensorboard .*; pip install tensorboard"):
        summary_writer()
    with pytest.raises(StateError, match="needs the package tensorboard"):
        Board(tmp_path)


class Writer:
    """Stands in for torch's writer."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.values: dict[str, dict[int, float]] = {}
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, float)
        self.values.setdefault(name, {})[step] = value

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_losses_rates_scales_ranges_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.train.board.summary_writer", lambda: Writer)
    x, _ = next(iter(blobs()))
    qmodel = qat.prepare(small(), x, target=qat.load_target("onnxruntime-cpu"))
    log = TrainingLog(tmp_path / "log.jsonl", every=3, board=Board(tmp_path / "board"))
    fit(qmodel, blobs(), TrainSettings(epochs=2, optimizer=OptimizerSettings(lr=0.1)), log=log,
        validation=blobs(24, name="validation"))  # fmt: skip
    (writer,) = Writer.made
    assert writer.closed
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "board"), 1)
    names = set(writer.values)
    assert {"train/loss", "train/lr", "train/gradient_norm", "validation/top1", "epoch/loss"} <= names
    assert {"scale/4", "range_min/4", "range_max/4", "scale/0.weight", "range_max/4.weight"} <= names
    assert any(name.startswith("gradient/") for name in names)
    assert list(writer.values["train/loss"]) == [3, 6, 9, 12]
    # weights move, and what is shown of them with them
    assert len(set(writer.values["scale/4.weight"].values())) == 4
    encoding = qmodel.encodings()["4.weight"]
    final = quantizer_scalars(qmodel)
    assert final["scale/4.weight"] == pytest.approx(sum(encoding.scale) / len(encoding.scale))
    assert quantizer_scalars(small()) == {}


def test_event_files_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = small()
    for first in (0, 4):
        board = Board(tmp_path)
        board.begin(first)
        for step in range(first + 1, first + 6):
            board.step(StepRecord(1, step, float(step + first), 0.5, 0.1, 1.0, {"h.n": 2.0}), model)
        board.epoch(EpochRecord(1, 0.5, 0.5, 0.1, 1.0), first + 5)
        board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    # of what was written twice, the later counts
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        *((s, float(s)) for s in range(1, 5)),
        *((s, float(s + 4)) for s in range(5, 10)),
    ]
    assert found.Scalars("hooks/h.n")[0].value == 2.0


def epoch(stage: int, number: int, **more: Any) -> dict[str, Any]:
    values = {"kind": "epoch", "stage": stage, "label": "float", "epoch": number, "step": 10 * number}
    return {**values, "loss": 1 / number, "top1": 0.9, "lr": 0.1**number, "seconds": 1.0, **more}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_are_drawn_of_whatever_there_is(tmp_path: Path) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "train.png"
    assert not draw_curves(log, picture)
    write(log, [])
    assert not draw_curves(log, picture)
    assert not picture.exists()
    for records in (
        [epoch(0, 1)],
        [epoch(0, 1), epoch(0, 2, validation_top1=0.5, validation_loss=2.0)],
        [
            {"kind": "step", "stage": 0, "label": "float", "epoch": 1, "step": 5, "loss": 2.0, "top1": 0.1, "lr": 0.0},
            {"kind": "return", "stage": 0, "label": "float", "epoch": 1, "step": 5, "cause": "nan", "rate": 0.5},
            epoch(0, 1),
            *(epoch(stage, n, label="QAT") for stage in (2, 3) for n in (1, 2)),
        ],
    ):
        write(log, records)
        assert draw_curves(log, picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        draw_curves(log, tmp_path / "folder")


def test_a_line_that_is_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, [epoch(0, 1), epoch(1, 1), epoch(1, 2)])
    path.write_text(path.read_text() + '{"kind": "ep')
    assert [r["stage"] for r in read_log(path)] == [0, 1, 1]
    log = TrainingLog(path, stage=1)
    log.begin(2)
    assert log.position() == 2
    log.epoch(EpochRecord(2, 0.1, 1.0, 0.1, 1.0), 20)
    assert [(r["stage"], r["epoch"]) for r in read_log(path)] == [(0, 1), (1, 1), (1, 2)]
    log.begin()
    assert [r["stage"] for r in read_log(path)] == [0]


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*folder"):
        log.went_back("x", 1, 1, 0.5)


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599, 3600, 100_000)] == ["0:00", "1:00", "59:59", "1:00:00", "27:46:40"]


def test_progress_tells_loss_accuracy_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    made: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, items: Iterable[Any], **options: Any) -> None:
            self.items = items
            made.append(options)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)

        def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            shown.append(text)

    monkeypatch.setattr("qat.train.loop.progress", Bar)
    fit(small(), blobs(), TrainSettings(epochs=2), description="QAT")
    assert [(o["description"], o["total"], o["initial"]) for o in made] == [("QAT 1/2", 6, 0), ("QAT 2/2", 6, 0)]
    assert len(shown) == 12
    assert all(re.fullmatch(r"loss \d\.\d{4}, top-1 \d+\.\d\d %, \d+:\d\d left", text) for text in shown)
    assert shown[-1].endswith("0:00 left")
