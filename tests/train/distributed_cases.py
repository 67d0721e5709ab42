"""What two processes do for `test_distributed.py`, and the same for one; results go to files of a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from training_cases import blobs, small

import qat
from qat.errors import QatError
from qat.graph.prepared import PreparedModel
from qat.train import processes
from qat.train.data import AugmentSpec, DataSpec, Share, Split, load_data
from qat.train.evaluate import evaluate
from qat.train.hooks import Hook
from qat.train.log import TrainingLog
from qat.train.settings import (
    CheckpointSettings,
    DistillSettings,
    GuardSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from qat.train.store import TrainingCheckpoints
from qat.train.sync_norm import synchronized_norms
from qat.train.trainer import fit

CPU = torch.device("cpu")
CONSTANT = ScheduleSettings("constant")
ONCE = TrainSettings(epochs=1, schedule=CONSTANT)


def digits(batch_size: int = 32, last_batch: Literal["drop", "keep"] = "drop") -> Split:
    augment = AugmentSpec(crop_padding=1)
    spec = DataSpec("digits", batch_size=batch_size, augment=augment, limit={"train": 200}, last_batch=last_batch)
    train = load_data(spec).train
    assert train is not None
    return train


def network(norms: bool = True, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 6, 3, stride=2), *([nn.BatchNorm2d(6)] if norms else []), nn.ReLU()]
    second = [nn.Conv2d(6, 8, 3), *([nn.BatchNorm2d(8)] if norms else []), nn.ReLU6(), nn.Dropout(dropout)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8, 10))


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10))


def prepared(dropout: float = 0.0, scheme: Mapping[str, Any] | None = None) -> PreparedModel:
    split, target = digits(), qat.load_target("onnxruntime-cpu")
    qmodel = qat.prepare(network(dropout=dropout).train(), split.sample(2), target=target, scheme=scheme)
    own = split.sharded(Share(processes.rank(), processes.size(), "batch"))
    qat.calibrate(qmodel, own.images(100), samples=100)
    return qmodel


class Pull(Hook):
    """Adds to the loss what is not of the images, and keeps state."""

    name = "pull"

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps, self.stop_after = 0, stop_after

    def loss(self, model: nn.Module) -> Tensor:
        return 1e-2 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))

    def step_end(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            raise Stop

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.steps = int(tensors["steps"])


class Spare(nn.Module):
    """A model with a weight that nothing comes of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Stop(Exception):
    """Stands in for a process that ends."""


def _train(model: nn.Module, settings: TrainSettings, split: Split, **more: Any) -> tuple[nn.Module, Any]:
    records = fit(model, split, settings, validation=blobs_or(split), quiet=True, **more)
    return model, [{k: v for k, v in r.to_json().items() if k != "seconds"} for r in records]


def blobs_or(split: Split) -> Split:
    return replace(split, name="validation", drop_last=False)


SGD = OptimizerSettings(lr=0.05)
#: what is trained, each in one process and in two
TRAININGS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "plain": lambda: _train(network(norms=False), TrainSettings(2, SGD), digits()),
    "norms": lambda: _train(network(), TrainSettings(2, SGD), digits()),
    "uneven": lambda: _train(
        network(),
        TrainSettings(2, SGD, accumulate=2, clip_norm=1.0, ema=0.9),
        digits(33, last_batch="keep"),
        hooks=[Pull()],
    ),
    "distilled": lambda: _train(
        network(), TrainSettings(1, SGD, distill=DistillSettings(features=("0", "4"))), digits(31), teacher=network()
    ),
    "diverging": lambda: _train(
        linear(), TrainSettings(2, OptimizerSettings(lr=3e4), guard=GuardSettings(retries=9, factor=0.05)), digits()
    ),
    "spare": lambda: _train(Spare(), TrainSettings(1, OptimizerSettings(lr=0.05, weight_decay=0.1)), digits()),
    "tracked": lambda: _train(prepared(), TrainSettings(2, OptimizerSettings(lr=0.01)), digits()),
    "learned": lambda: _train(
        prepared(scheme={"activations": {"quantizer": "lsq"}, "weights": {"quantizer": "lsq"}}),
        TrainSettings(2, OptimizerSettings(lr=0.01), quantize_after=0.5, freeze_ranges_after=1.5),
        digits(),
    ),
    "scheduled": lambda: _train(
        prepared(),
        TrainSettings(2, OptimizerSettings(lr=0.01), quantize_after=0.5, freeze_ranges_after=1, freeze_bn_after=1.5),
        digits(),
    ),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith("_extra_state")}


def run_trainings(folder: Path) -> None:
    prepared().encodings().save(folder / "calibrated.json")
    for name, train in TRAININGS.items():
        model, records = train()
        torch.save(state(model), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(records))
        if isinstance(model, PreparedModel):
            model.encodings().save(folder / f"{name}-encodings.json")


def normalize(kind: type[nn.Module], x: Tensor, grad: Tensor, momentum: float | None) -> list[Tensor]:
    """Outputs, gradients and statistics of a batch norm for this process's part of a batch."""
    torch.manual_seed(1)
    norm = kind(3, momentum=momentum)  # type: ignore[call-arg]
    nn.init.normal_(norm.weight)
    index = Share(processes.rank(), processes.size()).of(0, torch.arange(len(x)))
    assert index is not None
    part = x[index].clone().requires_grad_()
    for _ in range(2):
        y = norm(part) if processes.size() == 1 else _synchronized(norm, part)
    y.backward(grad[index])
    statistics = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [y.detach(), part.grad, norm.weight.grad, norm.bias.grad, *statistics]


def _synchronized(norm: nn.Module, x: Tensor) -> Tensor:
    holder = nn.Sequential(norm)
    kind = type(norm)
    with synchronized_norms(holder) as alone:
        assert alone == ()
        assert isinstance(norm, kind)
        assert type(norm) is not kind
        y: Tensor = holder(x)
    assert type(norm) is kind
    return y


def norm_cases() -> Iterator[tuple[type[nn.Module], Tensor, Tensor, float | None]]:
    for kind, shape in ((nn.BatchNorm1d, (7, 3)), (nn.BatchNorm2d, (5, 3, 4, 2)), (nn.BatchNorm3d, (3, 3, 2, 2, 2))):
        for offset in (0.0, 100.0):
            yield kind, torch.randn(shape) + offset, torch.randn(shape), None if offset else 0.1


def failures(folder: Path, rank: int) -> None:
    """What each process says where one of them fails, but all live on."""
    messages = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
            messages.append("")
        except QatError as error:
            messages.append(f"{type(error).__name__}: {error}")

    def refuse() -> str:
        raise QatError("no place", "make some")

    attempt(lambda: processes.text_of_first(refuse))
    split = digits()

    def broken(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(split.batches(epoch)):
            yield (x * float("nan") if i == 1 and rank == 1 else x), y

    attempt(lambda: fit(network(), replace(split, batches=broken, shares_from=None), ONCE, quiet=True))
    attempt(lambda: fit(small(), blobs(4, batch_size=1), ONCE, quiet=True))
    (folder / f"failures-{rank}.json").write_text(json.dumps(messages))


def small_batches(folder: Path) -> None:
    said: list[str] = []
    # of 33 images the last one is a batch of its own
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    records = fit(model, blobs(33, batch_size=16), ONCE, quiet=True, say=said.append)
    (folder / f"left-out-{processes.rank()}.json").write_text(json.dumps([said, records[0].loss]))


def resumed(folder: Path) -> None:
    """A training that is stopped and resumed, and one that is not; with dropout, whose draws differ by process."""
    settings = TrainSettings(
        epochs=3,
        optimizer=OptimizerSettings("adamw", lr=0.01),
        ema=0.9,
        patience=2,
        checkpoint=CheckpointSettings(every_steps=2, every_seconds=1000.0),
    )

    def train(where: str, hook: Pull) -> PreparedModel:
        model = prepared(dropout=0.3)
        torch.manual_seed(5 + 10 * processes.rank())
        (folder / where).mkdir(exist_ok=True)
        store, log = TrainingCheckpoints(folder / where / "c"), TrainingLog(folder / where / "log.jsonl", every=2)
        _train(model, settings, digits(), hooks=[hook], store=store, log=log)
        return model

    with pytest.raises(Stop):
        train("stopped", Pull(9))
    for where in ("stopped", "whole"):
        model = train(where, Pull())
        torch.save(state(model), folder / f"{where}-{processes.rank()}.pt")


def messages(folder: Path, rank: int) -> None:
    mine = {"a": torch.full((2, 3), rank, dtype=torch.bfloat16), "b": torch.tensor(rank == 0), "c": torch.zeros(0)}
    shared = processes.tensors_of_first(mine)
    texts = processes.text_of_each("é" * (1 + 3 * rank))
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    processes.share_state(model)
    result = {
        "shared": {k: [str(v.dtype), v.tolist()] for k, v in shared.items()},
        "texts": texts,
        "first": processes.text_of_first(lambda: f"of {processes.rank()}"),
        "nothing": processes.text_of_first(str),
        "sums": processes.summed([1.5, rank]),
        "each": processes.of_each(rank + 7),
        "state": float(sum(p.detach().double().sum() for p in model.parameters())),
        "measured": asdict(evaluate(network().eval(), blobs_or(digits(33, "keep")), quiet=True, together=True)),
    }
    (folder / f"messages-{rank}.json").write_text(json.dumps(result))


def ended(rank: int) -> None:
    """One process ends in the middle of a training."""
    split = digits()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(split.batches(epoch)):
            if i == 2 and rank == 1:
                os._exit(0)
            yield batch

    fit(network(), replace(split, batches=batches, shares_from=None), ONCE, quiet=True)


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, (str(rank), "2", str(rank), "127.0.0.1", str(port)), strict=True))
    place = Path(folder)
    with processes.joined(CPU):
        assert (processes.rank(), processes.size(), processes.is_first()) == (rank, 2, rank == 0)
        own = place / str(rank)
        own.mkdir()
        run_trainings(own)
        torch.manual_seed(3)
        torch.save([normalize(*case) for case in norm_cases()], own / "normalized.pt")
        small_batches(place)
        resumed(place)
        messages(place, rank)
        failures(place, rank)
    assert processes.size() == 1
    os.environ["MASTER_PORT"] = str(port + 1)
    try:
        with processes.joined(CPU):
            ended(rank)
    except QatError as error:
        (place / "ended.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def free_port() -> int:
    """A port that is free, and the one after it too, as far as one can tell."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
