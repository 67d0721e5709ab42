"""Calibration: the same ranges however the data comes, and no trace where it fails."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qat
from qat.errors import DataError, StateError
from qat.graph.prepared import PreparedModel
from qat.quantizers import Quantizer

TARGET = qat.load_target("onnxruntime-cpu")


class Net(nn.Module):
    """A small vision network with a tie, a class token and a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.full((1, 1, 8), 9.0))
        self.place = nn.Parameter(torch.randn(1, 10, 8))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.place
        return self.head(self.drop(y).mean(1))


IMAGES = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def prepare(**activations: Any) -> PreparedModel:
    torch.manual_seed(0)
    return qat.prepare(Net(), IMAGES[:2], target=TARGET, scheme={"activations": activations} if activations else None)


@pytest.fixture(scope="module")
def made() -> PreparedModel:
    return prepare()


@pytest.fixture
def qmodel(made: PreparedModel) -> PreparedModel:
    return copy.deepcopy(made)


# -- forms of the data


def test_any_iterable_will_do(qmodel: PreparedModel) -> None:
    def generator() -> Iterator[Any]:
        yield IMAGES[:20]
        yield IMAGES[20:30], torch.zeros(10)
        yield {"x": IMAGES[30:]}

    assert qat.calibrate(qmodel, generator()) == 60
    other = copy.deepcopy(qmodel)
    qat.calibrate(other, [IMAGES])
    assert qmodel.encodings() == other.encodings()
    assert all(q.quantizing and not q.observing for q in qmodel.activation_quantizers().values())


def test_a_limit_in_the_middle_of_a_batch(qmodel: PreparedModel) -> None:
    consumed = []

    def generator() -> Iterator[Tensor]:
        for start in range(0, 60, 20):
            consumed.append(start)
            yield IMAGES[start : start + 20]

    with pytest.warns(UserWarning, match="calibrated on 30 samples only; 50 or more are advisable"):
        assert qat.calibrate(qmodel, generator(), samples=30) == 30
    assert consumed == [0, 20]
    assert qmodel.encodings()["x"].samples == 30
    other = copy.deepcopy(qmodel)
    with pytest.warns(UserWarning, match="30 samples only"):
        qat.calibrate(other, [IMAGES[:30]])
    assert other.encodings() == qmodel.encodings()


def test_enough_samples_give_no_warning(qmodel: PreparedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.calibrate(qmodel, [IMAGES])


def test_samples_are_kept_for_verification(qmodel: PreparedModel) -> None:
    qat.calibrate(qmodel, [IMAGES[i : i + 7] for i in range(0, 60, 7)])
    assert len(qmodel.samples) == 1
    assert torch.equal(qmodel.samples[0], IMAGES[:16])
    assert "samples" not in qmodel.state_dict()


def test_a_calibrated_model_can_be_calibrated_again(qmodel: PreparedModel) -> None:
    qat.calibrate(qmodel, [IMAGES])
    before = qmodel.encodings()
    qat.calibrate(qmodel, [IMAGES * 2])
    assert qmodel.encodings()["x"].scale[0] == pytest.approx(2 * before["x"].scale[0])
    qat.calibrate(qmodel, [IMAGES])
    assert qmodel.encodings() == before


# -- invariance


OBSERVERS = ("minmax", "percentile", "histogram")


@pytest.fixture(scope="module")
def by_observer() -> dict[str, tuple[PreparedModel, qat.Encodings]]:
    """By observer a model, and its encodings from all the data in one batch."""
    found = {}
    for name in OBSERVERS:
        qmodel = prepare(observer=name)
        calibrate_plainly(qmodel, [PIXELS])
        found[name] = qmodel, qmodel.encodings()
    return found


PIXELS = IMAGES[:12].round(decimals=1)


def calibrate_plainly(qmodel: PreparedModel, batches: list[Tensor]) -> None:
    # oneDNN may sum in another order for another batch size, which is the network's rounding and not calibration's;
    # the plain convolution, one sample at a time, does not
    with torch.backends.mkldnn.flags(enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qat.calibrate(qmodel, batches)


@given(
    observer=st.sampled_from(OBSERVERS),
    order=st.permutations(range(12)),
    cuts=st.sets(st.integers(1, 11), max_size=5),
)
@settings(max_examples=20)
def test_encodings_do_not_depend_on_the_division_of_the_data(
    by_observer: dict[str, tuple[PreparedModel, qat.Encodings]], observer: str, order: list[int], cuts: set[int]
) -> None:
    qmodel, whole = by_observer[observer]
    edges = [0, *sorted(cuts), 12]
    calibrate_plainly(qmodel, [PIXELS[order[a:b]] for a, b in itertools.pairwise(edges)])
    divided = qmodel.encodings()
    for name, encoding in whole.items():
        # the order of sums in a linear layer's BLAS depends on the number of rows: a rounding of its result
        tolerance = 1e-6 if name == "head" else 0.0
        assert divided[name].scale == pytest.approx(encoding.scale, rel=tolerance, abs=0), name
        assert divided[name].zero_point == encoding.zero_point, name
        assert divided[name].samples == encoding.samples


def test_constants_are_observed_once() -> None:
    qmodel = prepare(observer="minmax")
    qat.calibrate(qmodel, [IMAGES])
    table = qmodel.encodings()
    # the token is the largest in its tie group
    assert table["cat"].max == (9.0,)
    assert table["place"].samples == 1
    assert table["place"].min == (float(qmodel.get_parameter("place").detach().min()),)
    averaged = prepare(observer="percentile")
    counts = []
    for size in (60, 5):
        qat.calibrate(averaged, [IMAGES[i : i + size] for i in range(0, 60, size)])
        counts.append(averaged.encodings()["expand"])
    assert counts[0] == counts[1]


# -- only what is missing


def test_only_missing_keeps_what_training_has_set(qmodel: PreparedModel) -> None:
    qat.calibrate(qmodel, [IMAGES])
    qmodel.train()
    qmodel.set_phase("track")
    for _ in range(3):
        qmodel(IMAGES * 3)
    trained = qmodel.encodings()
    assert trained["x"].provenance == "qat"
    fresh = prepare()
    fresh.load_float_state_dict(qmodel.float_state_dict())
    fresh.load_encodings(qat.Encodings({name: trained[name] for name in ("x", "head")}))
    qat.calibrate(fresh, [IMAGES], only="missing")
    mixed = fresh.encodings()
    assert (mixed["x"].provenance, mixed["head"].provenance) == ("qat", "qat")
    assert (mixed["x"].scale, mixed["head"].scale) == (trained["x"].scale, trained["head"].scale)
    assert (mixed["mean"].provenance, mixed["mean"].method) == ("ptq", "histogram")
    assert mixed["mean"].samples == 60


def test_ranges_that_training_alone_has_set_are_not_missing(qmodel: PreparedModel) -> None:
    qmodel.train()
    qmodel.set_phase("track")
    qmodel(IMAGES * 3)
    # no phase or mode was changed since: nothing has told the quantizers
    qat.calibrate(qmodel, [IMAGES], only="missing")
    table = qmodel.encodings()
    assert table["x"].provenance == "qat"
    assert table["x"].max == (float((IMAGES * 3).max()),)


def test_merging_trained_and_calibrated_tables(qmodel: PreparedModel) -> None:
    qat.calibrate(qmodel, [IMAGES])
    calibrated = qmodel.encodings()
    qmodel.train()
    qmodel.set_phase("track")
    qmodel(IMAGES * 3)
    merged = calibrated.merge(qat.Encodings({"x": qmodel.encodings()["x"]}), prefer="other")
    assert {name: merged[name].provenance for name in ("x", "mean")} == {"x": "qat", "mean": "ptq"}
    qmodel.load_encodings(merged)
    assert qmodel.encodings()["x"] == merged["x"]
    assert qmodel.encodings()["mean"] == merged["mean"]


# -- what it leaves behind


def test_modes_are_restored(qmodel: PreparedModel) -> None:
    qmodel.train()
    qmodel.get_submodule("norm").eval()
    before = qmodel.get_buffer("norm.running_mean").clone()
    qat.calibrate(qmodel, [IMAGES])
    assert qmodel.training
    assert qmodel.get_submodule("drop").training
    assert not qmodel.get_submodule("norm").training
    assert torch.equal(qmodel.get_buffer("norm.running_mean"), before)
    assert all(p.grad is None for p in qmodel.parameters())


def failing(error: BaseException) -> Iterator[Tensor]:
    yield IMAGES[:20] * 5
    raise error


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_failure_leaves_the_model_as_it_was(qmodel: PreparedModel, error: BaseException, calibrated: bool) -> None:
    qmodel.train()
    if calibrated:
        qat.calibrate(qmodel, [IMAGES])
        qmodel.set_phase("track")
    phases = {name: m.phase for name, m in qmodel.named_modules() if isinstance(m, Quantizer)}
    before = qmodel.encodings() if calibrated else None
    with pytest.raises(type(error)):
        qat.calibrate(qmodel, failing(error))
    assert {name: m.phase for name, m in qmodel.named_modules() if isinstance(m, Quantizer)} == phases
    assert qmodel.training
    if calibrated:
        assert qmodel.encodings() == before
    assert qat.calibrate(qmodel, [IMAGES]) == 60
    other = prepare()
    qat.calibrate(other, [IMAGES])
    assert qmodel.encodings() == other.encodings()


# -- bad data


def test_no_data(qmodel: PreparedModel) -> None:
    for batches in ([], iter(()), [IMAGES[:0]]):
        with pytest.raises(DataError, match="no calibration data; give at least one batch"):
            qat.calibrate(qmodel, batches)
    with pytest.raises(DataError, match="calibration on 0 samples"):
        qat.calibrate(qmodel, [IMAGES], samples=0)
    with pytest.raises(StateError, match="cannot calibrate only 'mising'; choose all or missing"):
        qat.calibrate(qmodel, [IMAGES], only="mising")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_that_are_no_numbers(qmodel: PreparedModel, value: float) -> None:
    qat.calibrate(qmodel, [IMAGES])
    before = qmodel.encodings()
    bad = IMAGES.clone()
    bad[3, 0, 1, 1] = value
    with pytest.raises(DataError, match="tensor 'x': 1 of the observed values are nan or inf; check the data"):
        qat.calibrate(qmodel, [bad])
    assert qmodel.encodings() == before


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * 1e38)

    qmodel = qat.prepare(Overflowing(), torch.rand(2, 4), target=TARGET)
    with pytest.raises(DataError, match=r"tensor 'b': .* nan or inf"):
        qat.calibrate(qmodel, [torch.rand(60, 4) * 100])


def test_a_tie_that_is_not_finite_names_its_tensors(qmodel: PreparedModel) -> None:
    with torch.no_grad():
        qmodel.get_parameter("norm.weight").fill_(3e38)
    with pytest.raises(DataError, match=r"one of token, relu, cat \(they share a range\): .* nan or inf"):
        qat.calibrate(qmodel, [IMAGES * 10])


def test_weights_that_are_no_numbers(qmodel: PreparedModel) -> None:
    with torch.no_grad():
        qmodel.conv.parametrizations.weight.original[0, 0, 0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(DataError, match=r"the parameter 'conv\.weight' holds nan or inf"):
        qat.calibrate(qmodel, [IMAGES])


def test_a_batch_of_another_shape(qmodel: PreparedModel) -> None:
    with pytest.raises(DataError, match=r"the input 'x' of a batch has shape \(60, 3, 6, 5\); give batch x 3 x 6 x 6"):
        qat.calibrate(qmodel, [IMAGES[..., :5]])
    with pytest.raises(DataError, match=r"the input 'x' of a batch has dtype torch\.int64"):
        qat.calibrate(qmodel, [IMAGES.long()])


def test_a_fixed_batch_size_is_not_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.ones(len(x), 1)

    qmodel = qat.prepare(Fixed(), torch.zeros(20, 4), target=TARGET)
    assert qat.calibrate(qmodel, [torch.rand(20, 4)] * 5, samples=50) == 60
    assert qmodel.samples[0].shape == (20, 4)
