"""What `fit` adds by itself for a prepared model: the losses of quantizers and the tracker of oscillations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.graph.prepared import PreparedModel
from qat.train.data import Split
from qat.train.hooks import EpochRecord, Hook
from qat.train.log import TrainingLog
from qat.train.oscillation_settings import OscillationSettings
from qat.train.settings import OptimizerSettings, TrainSettings
from qat.train.trainer import fit

pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
SETTINGS = TrainSettings(epochs=2, optimizer=OptimizerSettings(lr=0.05))


def split() -> Split:
    y = torch.arange(96) % 3
    x = (torch.eye(3, 4)[y] * 3 + 0.5 * torch.randn(96, 4, generator=torch.Generator().manual_seed(0))).reshape(
        96, 4, 1, 1
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(16):
            yield x[index], y[index]

    return Split("train", 96, 16, batches)


def prepared(weights: str, activations: Any = "static") -> PreparedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = next(iter(split()))[0]
    scheme = {"weights": {"dtype": weights}, "activations": {"quantizer": activations}}
    qmodel = qat.prepare(net, x, target=qat.load_target("onnxruntime-cpu"), scheme=scheme)
    qat.calibrate(qmodel, split(), progress=False)
    return qmodel


@pytest.mark.parametrize(
    ("weights", "enabled", "tracked"), [("int4", "auto", True), ("int4", False, False), ("int8", "auto", False)]
)
def test_oscillations_are_tracked_below_8_bits(tmp_path: Any, weights: str, enabled: Any, tracked: bool) -> None:
    log = TrainingLog(tmp_path / "metrics.jsonl", 0, "QAT", 1)
    settings = TrainSettings(epochs=1, oscillation=OscillationSettings(enabled))
    fit(prepared(weights), split(), settings, log=log, quiet=True)
    assert ("oscillation." in (tmp_path / "metrics.jsonl").read_text()) == tracked


def test_the_decay_of_pact_is_part_of_the_loss() -> None:
    class Alpha(Hook):
        def __init__(self) -> None:
            self.values: list[float] = []

        def epoch_end(self, model: nn.Module, record: EpochRecord) -> None:
            assert isinstance(model, PreparedModel)
            self.values.append(sum(float(p.detach()) for _, p in model.quantizer_parameters()))

    ends = []
    for decay in (0.0, 0.5):
        alpha = Alpha()
        fit(prepared("int8", {"name": "pact", "decay": decay}), split(), SETTINGS, hooks=[alpha], quiet=True)
        ends.append(alpha.values[-1])
    assert ends[1] < 0.9 * ends[0]
