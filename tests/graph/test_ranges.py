"""Observers by the place of a tensor: what is not clipped, and what is clipped for the error after a leaky ReLU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.graph.plan import Plan
from qat.scheme import ObserverSpec

TARGETS = [qat.load_target(name) for name in ("onnxruntime-cpu", "arm-cpu")]
IMAGE = torch.zeros(2, 3, 8, 8)
HISTOGRAM, MINMAX = ObserverSpec("histogram"), ObserverSpec("minmax")


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> qat.Target:
    return request.param


def observers(made: Plan) -> dict[str, ObserverSpec]:
    """The observer of each range of activations."""
    return {e.name: e.scheme.observer for e in made if e.decision == "integer" and e.role != "weight" and e.scheme}


def plan(model: nn.Module, target: qat.Target, scheme: Any = None) -> Plan:
    return qat.plan(model, IMAGE, target=target, scheme=scheme)


def test_class_scores_are_not_clipped_and_the_rest_may_be(target: qat.Target) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert observers(plan(model, target)) == {"input": HISTOGRAM, "1": HISTOGRAM, "2": HISTOGRAM, "4": MINMAX}


def test_what_the_answer_is_pooled_or_normalized_from_is_not_clipped(target: qat.Target) -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert observers(plan(pooled, target)) == {"input": HISTOGRAM, "0": HISTOGRAM, "2": MINMAX, "3": MINMAX}

    normalized = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1))
    found = observers(plan(normalized, target))
    assert (found["input"], found["0"]) == (HISTOGRAM, MINMAX)


def test_with_few_bits_the_answer_may_be_clipped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    scheme = {"activations": {"dtype": "uint4"}, "weights": {"dtype": "int4"}}
    assert set(observers(plan(model, TARGETS[0], scheme)).values()) == {HISTOGRAM}


def test_the_error_after_a_leaky_relu(target: qat.Target) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)
    ).eval()
    found = observers(plan(model, target))
    assert found["1"] == ObserverSpec("histogram", {"negative_weight": 0.25})
    assert {found["input"], found["2"], found["3"], found["4"]} == {HISTOGRAM}


class Branches(nn.Module):
    def __init__(self, slopes: tuple[float, float] | None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.slopes = slopes

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.slopes is None:
            return self.last(F.leaky_relu(x, 0.1) + x)
        return self.last(F.leaky_relu(x, self.slopes[0]) + F.leaky_relu(x, self.slopes[1]))


@pytest.mark.parametrize(
    ("slopes", "weight"),
    [(None, None), ((0.1, 0.2), None), ((0.5, 0.5), 0.25), ((-0.5, -0.5), 0.25), ((2.0, 2.0), None)],
)
def test_what_others_read_too_is_clipped_for_all(slopes: tuple[float, float] | None, weight: float | None) -> None:
    found = observers(plan(Branches(slopes), TARGETS[0]))["first"]
    assert found == (HISTOGRAM if weight is None else ObserverSpec("histogram", {"negative_weight": weight}))


class TwoScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        both = torch.cat([a, b], 1)
        return F.leaky_relu(a), self.c(both), b


def test_a_tie_group_stays_one(target: qat.Target) -> None:
    made = plan(TwoScales(), target)
    assert made.tie_groups() == {"a": ("a", "b", "cat")}
    found = observers(made)
    # b is returned, so the range that it shares is not clipped
    assert {found[name] for name in ("a", "b", "cat", "c")} == {MINMAX}


def test_derived_tensors_show_the_observer_of_their_range() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    made = plan(model, TARGETS[0])
    assert made["0"].scheme is not None
    assert made["0"].scheme.observer == MINMAX
    assert made["1"].scheme == made["0"].scheme


@pytest.mark.parametrize("observer", ["minmax", {"name": "percentile", "percentile": 99.0}, "moving_average"])
def test_a_chosen_observer_is_kept(observer: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 4, 1))
    found = observers(plan(model, TARGETS[0], {"activations": {"observer": observer}}))
    assert len(set(found.values())) == 1
    by_layer = observers(plan(model, TARGETS[0], {"layers": {"2": {"activations": {"observer": observer}}}}))
    assert by_layer["2"] == found["2"]


def test_two_scores_above_all_others_are_no_tie() -> None:
    """Clipping them is the least squared error over all scores, and loses which is the larger one."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8))
    data = torch.rand(20000, 8)
    data[0, 3], data[0, 5] = 1.1, 1.11

    def scores(**layers: Any) -> Tensor:
        scheme = {"layers": {"input": {"activations": {"observer": "minmax"}}, **layers}}
        prepared = qat.prepare(model, data[:2], target=TARGETS[0], scheme=scheme).eval()
        qat.calibrate(prepared, data.split(5000), progress=False)
        with torch.no_grad():
            return prepared(data[:1])[0]

    apart = scores()
    assert apart[5] > apart[3]
    clipped = scores(linear={"activations": {"observer": {"name": "histogram", "mantissa_bits": 7}}})
    assert clipped[5] == clipped[3]
