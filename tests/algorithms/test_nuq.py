"""Non-uniform quantization: few codes, chosen well."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_checks import check_rounded, float_output, output_error, weight_codes
from small_nets import Linears, Residual, Shared, Transposed, make
from torch import nn

from qat.algorithms.nuq import cluster, nuq
from qat.errors import DataError, QuantizationWarning, StateError

INT8: dict[str, Any] = {}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_the_clustering_is_the_best_that_there_is(points: list[tuple[int, int]], count: int) -> None:
    values = torch.tensor([p for p, _ in points], dtype=torch.float64)
    weights = torch.tensor([w for _, w in points], dtype=torch.float64)
    levels = cluster(values, weights, count, -6, 6)
    assert len(levels) <= count
    assert bool((levels[1:] > levels[:-1]).all())
    if not float(weights.sum()):
        weights = torch.ones_like(weights)

    def cost(chosen: torch.Tensor) -> float:
        return float((weights * (values[:, None] - chosen).abs().amin(1).square()).sum())

    best = min(cost(torch.tensor(c, dtype=torch.float64)) for c in itertools.combinations(range(-6, 7), count))
    assert cost(levels) == pytest.approx(best)


def nearest_of_equal_levels(qmodel: Any, steps: int) -> None:
    """Restrict weights to equidistant codes, as a float grid of that many steps would."""
    for _, quantizer, weight in qmodel.weight_quantizers():
        codes = quantizer.codes(weight)[0]
        gap = 255 / (steps - 1)
        quantizer.set_codes(weight, (torch.round(codes / gap) * gap).round().clamp(-127, 127).int(), "equal")


@pytest.mark.parametrize("steps", [16, 32])
@pytest.mark.parametrize("kind", [Residual, Transposed, Linears])
def test_the_error_is_smaller_than_with_equidistant_codes(kind: type[nn.Module], steps: int) -> None:
    qmodel, data = make(kind, INT8)
    equal, _ = make(kind, INT8)
    wanted = float_output(qmodel, data)
    nearest_of_equal_levels(equal, steps)
    result = nuq(qmodel, [data], steps=steps, progress=False)
    assert output_error(qmodel, wanted, data) < 0.6 * output_error(equal, wanted, data)
    codes = weight_codes(qmodel)
    assert set(result.clusters) == set(codes)
    for key, levels in result.clusters.items():
        assert len(levels) <= steps
        assert list(levels) == sorted(set(codes[key].flatten().tolist()))
    check_rounded(qmodel, result.rounding, data)
    assert str(result).endswith("nuq on 64 samples")


def test_more_iterations_are_never_worse() -> None:
    errors = []
    for iterations in (1, 3):
        qmodel, data = make(Linears, INT8)
        result = nuq(qmodel, [data], steps=16, iterations=iterations, progress=False)
        errors.append(result.rounding.units[0].after)
    assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 20}, "steps is 20; choose 16 or 32"),
        ({"iterations": 0}, "iterations is 0; give a positive number"),
        ({"damping": 2.0}, "damping is 2.0; give a share in (0, 1)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    qmodel, data = make(Linears, INT8)
    with pytest.raises(StateError) as caught:
        nuq(qmodel, [data], progress=False, **options)
    assert str(caught.value) == message


def test_weights_that_have_not_8_bits() -> None:
    qmodel, data = make(Linears)
    with pytest.raises(StateError, match=r"'first\.weight' is int4 and 32 of 256 codes were asked for"):
        nuq(qmodel, [data], progress=False)


def test_a_shared_weight_is_left_alone() -> None:
    qmodel, data = make(Shared, INT8)
    with pytest.warns(QuantizationWarning, match=r"'twice\.weight' is shared by 2 layers"):
        result = nuq(qmodel, [data], progress=False)
    assert set(result.clusters) == {"once.weight"}


def test_no_data() -> None:
    qmodel, _ = make(Linears, INT8)
    with pytest.raises(DataError, match="no calibration data; give at least one batch"):
        nuq(qmodel, [])
