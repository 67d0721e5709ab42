"""The observer `auto`: the candidate that the reading layers do best with, by a computation of its own in float."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat import numerics
from qat.algorithms.replay import Replay, region_of
from qat.errors import DataError
from qat.graph.prepared import PreparedModel
from qat.observers import AutoObserver

pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
TARGET = qat.load_target("onnxruntime-cpu")
AUTO = {"activations": {"observer": "auto"}}
BY_LAYER = {"activations": {"observer": {"name": "auto", "error": "layer"}}}


class Net(nn.Module):
    """Batch norm, an addition and a ReLU in place, and a tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv1(x)))
        z = self.conv2(y)
        z += self.side(y)
        return self.head(F.relu(z, inplace=True).mean((2, 3)))


def images(count: int = 60) -> Tensor:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[5, 0, 2, 2] = 60.0
    return x


def prepared(scheme: Any = None, model: nn.Module | None = None) -> PreparedModel:
    torch.manual_seed(0)
    made = model if model is not None else Net()
    return qat.prepare(made.eval(), images()[:2], target=TARGET, scheme=AUTO if scheme is None else scheme)


def test_the_chosen_range_is_the_best_for_the_reading_layer() -> None:
    """What reads the input is conv1, with its norm and ReLU: done here by hand."""
    qmodel = prepared(BY_LAYER)
    x = images()
    qat.calibrate(qmodel, [x[:20], x[20:]])
    encoding = qmodel.encodings()["x"]
    quantizer = qmodel.activation_quantizers()["x"]
    assert isinstance(quantizer.observer, AutoObserver)
    torch.manual_seed(0)
    net = Net().eval()

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero_point = numerics.range_to_scale(low, high, quantizer.scheme)
        codes = numerics.quantize(x, scale, zero_point, *quantizer.scheme.code_range)
        quantized = numerics.dequantize(codes, scale, zero_point)
        with torch.no_grad():
            want, have = (F.relu(net.norm(net.conv1(v))) for v in (x, quantized))
        return float((want - have).square().sum())

    errors = {name: error(*bounds) for name, bounds in quantizer.observer.candidates(quantizer.scheme).items()}
    assert set(errors) == {"minmax", "percentile 99.99", "percentile 99.9", "histogram", "kl", "ifmr", "lp"}
    assert encoding.provenance == "ptq"
    assert errors[encoding.method] <= min(errors.values()) * (1 + 1e-5)
    # it matters here: one pixel is far outside
    assert min(errors.values()) < 0.95 * max(errors.values())


def test_every_tensor_gets_a_candidate_and_samples_stay_counted() -> None:
    qmodel = prepared()
    qat.calibrate(qmodel, [images()])
    for name, quantizer in qmodel.activation_quantizers().items():
        candidates = quantizer.observer.candidates(quantizer.scheme)
        encoding = quantizer.encoding()
        low, high = (float(bound) for bound in candidates[encoding.method])
        assert encoding.min is not None, name
        assert encoding.max is not None, name
        assert (encoding.min[0], encoding.max[0]) == pytest.approx((low, high), rel=1e-6), name
        assert encoding.samples == 60


def test_batches_and_their_order_do_not_matter() -> None:
    x = images()
    tables = []
    for batches in ([x], list(x.split(7)), list(reversed(x.split(13))), iter(x.split(16))):
        qmodel = prepared()
        assert qat.calibrate(qmodel, batches) == 60
        tables.append(qmodel.encodings())
    for table in tables:
        for name, encoding in table.items():
            # the rounding of convolutions depends on the size of the batch
            assert encoding.method == tables[0][name].method
            assert encoding.scale == pytest.approx(tables[0][name].scale, rel=1e-6)
            assert encoding.zero_point == tables[0][name].zero_point


def test_the_limit_on_samples_holds_for_both_passes() -> None:
    x = images()
    x[40:] = 1e6
    limited, short = prepared(), prepared()
    assert qat.calibrate(limited, list(x.split(16)), samples=30) == 30
    qat.calibrate(short, [x[:30]])
    assert limited.encodings() == short.encodings()


def test_training_and_phases_are_as_after_any_calibration() -> None:
    qmodel, plain = prepared(), prepared({})
    qmodel.train()
    plain.train()
    for model in (qmodel, plain):
        qat.calibrate(model, [images()])
    assert [m.training for m in qmodel.modules()] == [m.training for m in plain.modules()]
    weights, others = qmodel.float_state_dict(), plain.float_state_dict()
    assert all(torch.equal(weights[key], others[key]) for key in others)
    assert all(q.quantizing and not q.observing for q in qmodel.activation_quantizers().values())


def test_only_what_has_the_observer_is_chosen() -> None:
    scheme = {"activations": {"observer": "minmax"}, "layers": {"conv2": {"activations": {"observer": "auto"}}}}
    qmodel = prepared(scheme)
    qat.calibrate(qmodel, [images()])
    methods = {name: e.method for name, e in qmodel.encodings().items()}
    assert methods["x"] == "minmax"
    kinds = {name: isinstance(q.observer, AutoObserver) for name, q in qmodel.activation_quantizers().items()}
    assert sum(kinds.values()) == 1


def test_bad_data_change_nothing() -> None:
    qmodel = prepared()
    qat.calibrate(qmodel, [images()])
    before = copy.deepcopy(qmodel.state_dict())
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"'x'.* nan or inf"):
        qat.calibrate(qmodel, [bad])
    after = qmodel.state_dict()
    ranges = [key for key in before if key.endswith((".scale", ".zero_point", ".min_val")) and "observer" not in key]
    assert ranges
    assert all(torch.equal(before[key], after[key]) for key in ranges)


def test_a_weight_with_auto_has_the_least_error_of_its_elements() -> None:
    chosen, mse = (prepared({"weights": {"observer": name, "dtype": "int4"}}).eval() for name in ("auto", "mse"))
    for qmodel in (chosen, mse):
        qat.calibrate(qmodel, [images()])
    for (key, one, weight), (_, other, _) in zip(chosen.weight_quantizers(), mse.weight_quantizers(), strict=True):
        errors = [float((q(weight) - weight).square().sum()) for q in (one, other)]
        assert errors[0] <= errors[1] * 1.05, key


# -- running a part again


def test_replay_with_the_same_values_gives_the_same_results() -> None:
    """Operators in place must not see what they did to a value before."""
    qmodel = prepared()
    qmodel.set_phase("float")
    calls = [node for node in qmodel.graph.nodes if node.meta.get("quantizes") is not None]
    regions = [region_of(call) for call in calls]
    visited = []

    def visit(region: Any, value: Tensor, again: Any, ends: list[Any]) -> None:
        for _ in range(2):
            for want, have in zip(ends, again(value), strict=True):
                if isinstance(want, Tensor):
                    assert torch.equal(want, have)
        changed = again(value + 1.0)
        assert any(isinstance(w, Tensor) and not torch.equal(w, h) for w, h in zip(ends, changed, strict=True))
        visited.append(region.call)

    with torch.no_grad():
        Replay(qmodel, regions).run((images()[:4],), visit)
    assert sorted(n.name for n in visited) == sorted(n.name for n in calls)


def test_a_region_ends_where_the_next_quantizers_are() -> None:
    qmodel = prepared()
    names = {node.meta["quantizes"]: node for node in qmodel.graph.nodes if node.meta.get("quantizes") is not None}
    region = region_of(names["x"])
    assert [str(n.target) for n in region.nodes] == ["conv1", "norm", "relu"]
    assert [str(n.target) for n in region.ends] == ["relu"]
    both = region_of(names["relu"])
    assert {"conv2", "side"} <= {str(n.target) for n in both.nodes}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    qmodel = prepared()
    qat.calibrate(qmodel, [images()[:25] if rank == 0 else images()[25:]])
    qmodel.encodings().save(f"{folder}/{rank}.json")
    dist.destroy_process_group()


@pytest.mark.heavy
def test_processes_choose_alike(tmp_path: Any) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    tables = [qat.Encodings.load(tmp_path / f"{rank}.json") for rank in range(2)]
    assert tables[0] == tables[1]
    alone = prepared()
    qat.calibrate(alone, [images()])
    for name, encoding in alone.encodings().items():
        assert tables[0][name].method == encoding.method
        assert tables[0][name].scale == pytest.approx(encoding.scale, rel=1e-6)
