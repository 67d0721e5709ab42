"""Runs a recipe that is killed again and again: `killed_runs.py FOLDER KILLS SEED`; prints where it was killed as JSON.

It is run once without interruption (`whole`), and again and again until there were so many kills (`killed-N`). A
process of its own, so that it can fork with torch imported and not a single thread started.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# loaded before the children are made, each of which would load it again
import matplotlib.figure  # noqa: F401
import onnxruntime  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo

from qat.recipe import stages, training
from qat.recipe.load import parse_recipe
from qat.recipe.run import run_recipe

MODEL = """
from torch import nn
def build():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )
"""
CHECKPOINT = {"every_steps": 4, "keep": 2}
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "killed",
    "threads": 1,
    "model": {"factory": "model_of_killed_runs:build"},
    "data": {
        "name": "digits",
        "batch_size": 24,
        "augment": {"crop_padding": 1},
        "limit": {"train": 640, "test": 100},
        "validation": 40,
    },
    "stages": [
        {
            "train": {
                "phase": "float",
                "epochs": 5,
                "optimizer": {"name": "adamw", "lr": 0.01},
                "ema": 0.95,
                "accumulate": 2,
                "patience": 2,
                "checkpoint": CHECKPOINT,
                "log_every": 3,
            }
        },
        {"calibrate": {"images": 600}},
        {
            "train": {
                "epochs": 4,
                "optimizer": {"name": "sgd", "lr": 0.01},
                "quantize_after": 0.5,
                "freeze_ranges_after": 2,
                "freeze_bn_after": 3,
                "ema": 0.9,
                "clip_norm": 1.0,
                "reestimate_bn": 100,
                "distill": {"features": ["4"]},
                "checkpoint": CHECKPOINT,
                "log_every": 3,
            }
        },
    ],
    "export": {"onnx": {"samples": 16, "bound": 3.0, "unequal_share": 1.0}},
}
#: the parts of the run, in order: the function that does it, by its module
PHASES: dict[str, tuple[Any, str]] = {
    "float": (training, "train"),
    "calibrate": (stages, "calibrate"),
    "QAT": (training, "train"),
    "export": (stages, "export_onnx"),
}


#: where a run is killed, one after the other, before it may come to its end
SEQUENCE = ("float", "float", "calibrate", "QAT", "QAT", "export")


def wrap(phase: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` when a phase begins and `after` when it ends."""
    owner, name = PHASES[phase]
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if name == "train" and kwargs["place"].label != phase:
            return real(*args, **kwargs)
        before()
        result = real(*args, **kwargs)
        after()
        return result

    setattr(owner, name, wrapped)


def run(folder: Path) -> None:
    run_recipe(parse_recipe(RECIPE), folder, resume=True, quiet=True)


def killed(folder: Path, phase: str, delay: float) -> bool:
    """Run in a child that is killed `delay` seconds after a phase has begun; tell whether it was."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
            timer.daemon = True
            wrap(phase, timer.start, lambda: None)
            run(folder)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(status) == 0, "a resumed run failed"
    return False


def run_to_the_end(folder: Path) -> None:
    # not in this process, which must not start a thread
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the last resumed run failed"


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    folder.mkdir()
    (folder / "model_of_killed_runs.py").write_text(MODEL)
    os.chdir(folder)
    durations = dict.fromkeys(PHASES, 0.0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for phase in PHASES:

                def before(phase: str = phase) -> None:
                    durations[phase] -= time.monotonic()

                def after(phase: str = phase) -> None:
                    durations[phase] += time.monotonic()

                wrap(phase, before, after)
            run(Path("whole"))
            Path("durations.json").write_text(json.dumps(durations))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the run without interruption failed"
    durations = json.loads(Path("durations.json").read_text())
    draw = random.Random(seed)
    done: list[str] = []
    folders = 0
    while len(done) < kills:
        assert folders < kills, "hardly any run is killed in time"
        folder, folders = Path(f"killed-{folders}"), folders + 1
        for phase in SEQUENCE[: kills - len(done)]:
            was_killed = killed(folder, phase, draw.uniform(0.0, 0.5 * durations[phase]))
            done += [phase] * was_killed
        run_to_the_end(folder)
    print(json.dumps({"kills": done, "folders": folders, "seconds": durations}))


if __name__ == "__main__":
    main()
