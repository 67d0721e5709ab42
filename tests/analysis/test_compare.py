"""`compare`: error by tensor, agreement of answers, and what it refuses."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, DataError, StateError
from qat.graph.prepared import PreparedModel

TARGET = qat.load_target("onnxruntime-cpu")
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).relu(), self.b(x)], 1))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, PreparedModel]:
    torch.manual_seed(0)
    model = Net()
    qmodel = qat.prepare(model, X[:2], target=TARGET)
    qat.calibrate(qmodel, [X])
    return model, qmodel


def test_rows_are_the_errors_of_each_tensor(pair: tuple[nn.Module, PreparedModel]) -> None:
    model, qmodel = pair
    found = qat.compare(model, qmodel, [X[:30], (X[30:], 0)])
    assert found.samples == 80
    assert [t.name for t in found.tensors] == ["x", "relu", "b", "head"]
    rows = {t.name: t for t in found.tensors}
    with torch.no_grad():
        encoding = qmodel.encodings()["x"]
        noise = encoding.dequantize(encoding.quantize(X)) - X
        want, have = model(X), qmodel.eval()(X)
    ratio = float(X.square().sum() / noise.square().sum())
    assert rows["x"].sqnr_db == pytest.approx(10 * math.log10(ratio), rel=1e-5)
    assert rows["x"].max_error == pytest.approx(float(noise.abs().max()), rel=1e-5)
    assert rows["head"].max_error == pytest.approx(float((want - have).abs().max()), rel=1e-4)
    assert rows["head"].sqnr_db == pytest.approx(found.output_sqnr_db, rel=1e-6)
    cosine = torch.cosine_similarity(want.flatten(), have.flatten(), 0)
    assert rows["head"].cosine == pytest.approx(float(cosine), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((want.argmax(1) == have.argmax(1)).float().mean()))
    assert found.top5_agreement is not None
    assert found.top5_agreement >= (found.top1_agreement or 0)
    assert all(t.dtype == "uint8" for t in found.tensors)
    assert found.worst(2)[0].sqnr_db == min(t.sqnr_db for t in found.tensors)


def test_saturation_is_the_share_outside_the_range(pair: tuple[nn.Module, PreparedModel]) -> None:
    model, qmodel = pair
    found = qat.compare(model, qmodel, [X * 2])
    row = found.tensors[0]
    low, high = (float(v) for v in qmodel.encodings()["x"].representable())
    outside = ((low > X * 2) | (high < X * 2)).float().mean()
    assert outside > 0
    assert row.saturated == pytest.approx(float(outside))


def test_printing(pair: tuple[nn.Module, PreparedModel]) -> None:
    text = str(found := qat.compare(*pair, [X]))
    assert "SQNR dB" in text.splitlines()[0]
    assert "80 samples, output SQNR" in text
    assert "top-1 agreement" in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["tensors"][0]["name"] == "x"


def test_both_models_are_left_alone(pair: tuple[nn.Module, PreparedModel]) -> None:
    model, qmodel = copy.deepcopy(pair)
    model.train()
    qmodel.train()
    qmodel.set_phase("track")
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    qat.compare(model, qmodel, [X])
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    assert model.training
    assert qmodel.training
    assert not any(m._forward_hooks for m in qmodel.modules())


def test_the_limit_counts_samples(pair: tuple[nn.Module, PreparedModel]) -> None:
    first = qat.compare(*pair, [X[:7], X[7:10]])
    assert first.samples == 10
    assert qat.compare(*pair, iter([X[:7], X[7:]]), samples=10) == first


def test_an_output_that_is_no_class_score() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"maps": [self.conv(x)]}

    x = torch.rand(60, 3, 4, 4)
    model = Dense()
    qmodel = qat.prepare(model, x[:2], target=TARGET)
    qat.calibrate(qmodel, [x])
    found = qat.compare(model, qmodel, [x])
    assert found.top1_agreement is None
    assert found.top5_agreement is None
    assert "agreement" not in str(found)
    assert math.isfinite(found.output_sqnr_db)


def test_what_does_not_fit(pair: tuple[nn.Module, PreparedModel]) -> None:
    model, qmodel = pair
    with pytest.raises(CheckpointError, match="the float state lacks"):
        qat.compare(nn.Linear(6, 7), qmodel, [X])
    with pytest.raises(DataError, match="no data to compare on"):
        qat.compare(model, qmodel, [])
    with pytest.raises(DataError, match="the input 'x' of a batch has shape"):
        qat.compare(model, qmodel, [X[:, :5]])
    fresh = qat.prepare(model, X[:2], target=TARGET)
    with pytest.raises(StateError, match="'x' has no range yet; calibrate"):
        qat.compare(model, fresh, [X])
