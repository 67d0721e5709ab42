"""Runs that are killed at any moment end, resumed, with the very same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qat.train.log import read_log

SCRIPT = Path(__file__).with_name("killed_runs.py")
TIMES = ("seconds",)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1])
def test_twenty_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    kills = 20
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "runs"), str(kills), str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["kills"]) == kills
    assert set(told["kills"]) == {"float", "calibrate", "QAT", "export"}
    whole = tmp_path / "runs" / "whole"
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    same = [n for n in names if n.endswith((".safetensors", ".onnx", ".yaml")) or n in ("encodings.json", "plan.json")]
    assert len(same) == 8
    resumed = 0
    for number in range(told["folders"]):
        killed = tmp_path / "runs" / f"killed-{number}"
        assert names == sorted(str(p.relative_to(killed)) for p in killed.rglob("*") if p.is_file())
        for name in same:
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
        assert metrics[1]["status"] == "done"
        assert without_times(metrics[0]) == without_times(metrics[1])
        assert without_times(read_log(whole / "metrics.jsonl")) == without_times(read_log(killed / "metrics.jsonl"))
        resumed += (killed / "log.txt").read_text().count("resuming at epoch")
    # in the midst of training
    assert resumed >= 5
