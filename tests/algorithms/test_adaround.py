"""AdaRound: a smaller error at 4 bits, neighbouring codes, and every layer that there is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding_checks import check_rounded, float_output, floors, output_error, trains, weight_codes
from small_nets import Linears, Residual, Shared, Transposed, calibrated, make, vectors
from torch import Tensor, nn

from qat.algorithms.adaround import adaround
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel

PER_TENSOR = {"weights": {"dtype": "int4", "granularity": "per_tensor"}}
PER_GROUP = {"weights": {"dtype": "int4", "granularity": "per_group", "group_size": 8}}
HISTOGRAM = {"weights": {"dtype": "int4", "observer": "histogram"}}


@pytest.mark.parametrize(
    ("kind", "scheme", "factor"),
    [
        (Residual, None, 0.5),
        (Residual, PER_TENSOR, 0.5),
        (Residual, HISTOGRAM, 0.6),
        (Transposed, None, 0.7),
        (Linears, None, 0.5),
        (Linears, PER_GROUP, 0.5),
    ],
)
def test_the_error_is_smaller_than_that_of_rounding_to_nearest(
    kind: type[nn.Module], scheme: dict[str, Any] | None, factor: float
) -> None:
    qmodel, data = make(kind, scheme)
    wanted, lowest = float_output(qmodel, data), floors(qmodel)
    ranges = {key: (q.qmin, q.qmax) for key, q, _ in qmodel.weight_quantizers()}
    before = output_error(qmodel, wanted, data)
    with warnings.catch_warnings():
        # a layer may keep its rounding, and says so
        warnings.simplefilter("ignore", QuantizationWarning)
        result = adaround(
            qmodel, [data], iterations=60, batch_size=8, learning_rate=0.05, correct=False, progress=False
        )
    assert output_error(qmodel, wanted, data) < factor * before
    for key, codes in weight_codes(qmodel).items():
        low, high = (t.clamp(*ranges[key]) for t in (lowest[key], lowest[key] + 1))
        assert bool(((codes == low) | (codes == high)).all()), key
    check_rounded(qmodel, result, data)


def test_correction_makes_up_for_what_a_layer_reads() -> None:
    errors = {}
    for correct in (False, True):
        qmodel, data = make(Residual)
        wanted = float_output(qmodel, data)
        adaround(qmodel, [data], iterations=60, batch_size=8, learning_rate=0.05, correct=correct, progress=False)
        errors[correct] = output_error(qmodel, wanted, data)
    assert errors[True] < errors[False]


def test_the_result_says_what_became_of_each_layer() -> None:
    qmodel, data = make(Linears)
    result = adaround(qmodel, [data], iterations=40, learning_rate=0.05, samples=32, progress=False)
    assert [(u.name, u.weights) for u in result.units] == [("relu", ("first.weight",)), ("second", ("second.weight",))]
    assert all(u.after < u.before for u in result.units)
    assert result.samples == 32
    assert str(result).splitlines()[0].split() == ["unit", "weights", "error", "before", "after"]
    assert str(result).endswith("adaround on 32 samples")


def test_the_seed_decides() -> None:
    qmodel, data = make(Linears)
    codes = []
    for seed in (0, 0, 1):
        other = copy.deepcopy(qmodel)
        adaround(other, [data], iterations=30, learning_rate=0.05, batch_size=1, seed=seed, progress=False)
        codes.append(torch.cat([c.flatten() for c in weight_codes(other).values()]))
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_training_goes_on() -> None:
    qmodel, data = make(Residual)
    adaround(qmodel, [data], iterations=5, progress=False)
    assert trains(qmodel, data)


def test_gradients_of_the_network_stay_as_they_are() -> None:
    qmodel, data = make(Linears)
    adaround(qmodel, [data], iterations=5, progress=False)
    assert all(p.grad is None for p in qmodel.parameters())


def test_a_worse_rounding_is_not_taken() -> None:
    qmodel, data = make(Linears)
    before = weight_codes(qmodel)
    # one step of this size rounds half of the weights the wrong way
    with pytest.warns(QuantizationWarning, match=r"adaround of first\.weight would raise the error of 'relu' from"):
        result = adaround(qmodel, [data], iterations=1, learning_rate=100.0, reg_param=1e-9, progress=False)
    assert result.units[0].kept
    assert torch.equal(weight_codes(qmodel)["first.weight"], before["first.weight"])
    assert "kept" in str(result)


def test_a_shared_weight_stays_rounded_to_nearest() -> None:
    qmodel, data = make(Shared)
    before = weight_codes(qmodel)
    with pytest.warns(QuantizationWarning, match=r"'twice\.weight' is shared by 2 layers and stays rounded to nearest"):
        result = adaround(qmodel, [data], iterations=30, learning_rate=0.05, progress=False)
    assert [u.weights for u in result.units] == [("once.weight",)]
    assert torch.equal(weight_codes(qmodel)["twice.weight"], before["twice.weight"])


def test_float_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    qmodel = calibrated(Linears(), vectors(), {"weights": {"dtype": "int4"}, "layers": {"second": "float"}})
    weight = qmodel.get_parameter("second.weight").detach().clone()
    result = adaround(qmodel, [vectors()], iterations=10, progress=False)
    assert [u.weights for u in result.units] == [("first.weight",)]
    assert torch.equal(qmodel.get_parameter("second.weight"), weight)


class Doubling(nn.Module):
    """A network without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0; give a positive number"),
        ({"batch_size": 0}, "batch_size is 0; give a positive number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; give a positive number"),
        ({"reg_param": -1.0}, "reg_param is -1.0; give a positive number"),
        ({"beta_range": (2.0, 20.0)}, "beta_range is (2.0, 20.0); give a start and a smaller positive end, as (20, 2)"),
        ({"warm_start": 1.0}, "warm_start is 1.0; give a share in [0, 1)"),
        ({"samples": 0}, "samples is 0; give a positive number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    qmodel, data = make(Linears)
    with pytest.raises(StateError) as caught:
        adaround(qmodel, [data], progress=False, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prepare", "batches", "error", "message"),
    [
        (lambda: make(Linears)[0], [], DataError, "no calibration data; give at least one batch"),
        (
            lambda: calibrated(Doubling(), vectors()), [vectors()], StateError,
            "the model has no quantized weight to round (it has none); check the scheme and the target",
        ),
    ],
)  # fmt: skip
def test_nothing_to_work_with(
    prepare: Callable[[], PreparedModel], batches: list[Tensor], error: type[Exception], message: str
) -> None:
    qmodel = prepare()
    with pytest.raises(error) as caught:
        adaround(qmodel, batches, progress=False)
    assert str(caught.value) == message


def test_weights_that_are_all_float() -> None:
    # the input's clamp is still an integer operator
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(x + x))  # type: ignore[no-any-return]

    qmodel = calibrated(Half(), vectors(), {"layers": {"layer": "float"}})
    with pytest.raises(StateError, match=r"no quantized weight to round \('layer\.weight' is float: layer is float\)"):
        adaround(qmodel, [vectors()], progress=False)


def test_data_that_are_not_finite() -> None:
    qmodel, data = make(Linears)
    data[3, 4] = torch.inf
    with pytest.raises(DataError, match="the float output of 'relu' holds nan or inf; check the data"):
        adaround(qmodel, [data], progress=False)
