"""Rows that are rounded for what they compute: the best candidate scale, and turns that never make a row worse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.algorithms.rows import CANDIDATES, Fit, Grid, best_scales, refine, row_errors

QMIN, QMAX = -4, 3


def problem(seed: int, groups: int = 2, rows: int = 3, columns: int = 6) -> tuple[Tensor, Tensor, Grid]:
    """Targets, second moments of correlated inputs, and a grid with a scale for each row."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(groups, rows, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(groups, 40, columns, dtype=torch.float64, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    step = (target.abs().amax(2, keepdim=True) / QMAX).expand_as(target)
    zero = torch.randint(-1, 2, (groups, rows, 1), generator=generator).double().expand_as(target)
    return target, inputs.transpose(1, 2) @ inputs + 0.1 * torch.eye(columns), Grid(step, zero, QMIN, QMAX)


def to_nearest(target: Tensor, grid: Grid) -> Tensor:
    codes = torch.clamp(torch.round(target / grid.step) + grid.zero_point, grid.qmin, grid.qmax)
    return (codes - grid.zero_point) * grid.step


def everywhere(target: Tensor) -> Tensor:
    return torch.ones_like(target[:, :, 0], dtype=torch.bool)


def test_the_scale_is_the_best_of_the_candidates_for_each_row_that_is_free() -> None:
    target, moments, grid = problem(0)
    free = everywhere(target)
    free[0, 1] = False
    fit = best_scales(target, moments, grid, to_nearest, free)
    assert fit is not None
    errors = torch.stack(
        [
            row_errors(to_nearest(target, grid.scaled(torch.full_like(target[:, :, 0], c))) - target, moments)
            for c in CANDIDATES
        ]
    )
    wanted = torch.where(free, errors.min(0).values, errors[0])
    torch.testing.assert_close(row_errors(fit.values - target, moments), wanted)
    assert float(fit.ratio[0, 1]) == 1.0
    assert len(fit.ratio.unique()) > 1
    torch.testing.assert_close(fit.values, to_nearest(target, grid.scaled(fit.ratio)))


def test_no_solution_is_passed_on() -> None:
    target, moments, grid = problem(0)
    for free in (everywhere(target), ~everywhere(target)):
        assert best_scales(target, moments, grid, lambda *_: None, free) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 5), st.booleans(), st.sampled_from([1, 6, 130]))
def test_no_row_gets_worse_and_all_stay_on_their_grids(seed: int, passes: int, may: bool, columns: int) -> None:
    target, moments, grid = problem(seed, columns=columns)
    free = everywhere(target) & may
    start = Fit(to_nearest(target, grid), torch.ones_like(target[:, :, 0]))
    found = refine(target, moments, grid, start, passes, free)
    before, after = (row_errors(fit.values - target, moments) for fit in (start, found))
    assert bool((after <= before * (1 + 1e-9)).all())
    codes = grid.scaled(found.ratio).codes(found.values)
    assert int(codes.min()) >= QMIN
    assert int(codes.max()) <= QMAX
    torch.testing.assert_close((codes - grid.zero_point) * grid.scaled(found.ratio).step, found.values)
    if not may:
        assert bool((found.ratio == 1).all())
    if not passes:
        assert torch.equal(found.values, start.values)


@pytest.mark.parametrize("seed", range(5))
def test_in_the_end_no_single_code_can_be_improved(seed: int) -> None:
    target, moments, grid = problem(seed)
    start = Fit(to_nearest(target, grid), torch.ones_like(target[:, :, 0]))
    found = refine(target, moments, grid, start, 100, ~everywhere(target))
    least = row_errors(found.values - target, moments)
    for k, code in itertools.product(range(target.shape[2]), range(QMIN, QMAX + 1)):
        other = found.values.clone()
        other[:, :, k] = (code - grid.zero_point[:, :, k]) * grid.step[:, :, k]
        assert bool((row_errors(other - target, moments) >= least - 1e-9).all())


def test_in_the_end_no_other_scale_is_better_for_the_codes() -> None:
    target, moments, grid = problem(3)
    start = Fit(to_nearest(target, grid), torch.ones_like(target[:, :, 0]))
    found = refine(target, moments, grid, start, 100, everywhere(target))
    least = row_errors(found.values - target, moments)
    for factor in (0.99, 1.01):
        assert bool((row_errors(found.values * factor - target, moments) > least).all())


def test_rows_without_a_value_other_than_zero_keep_their_scale() -> None:
    target, moments, grid = problem(1)
    start = Fit(torch.zeros_like(target), torch.ones_like(target[:, :, 0]))
    zero = Grid(grid.step, torch.zeros_like(target), QMIN, QMAX)
    found = refine(torch.zeros_like(target), moments, zero, start, 3, everywhere(target))
    assert torch.equal(found.values, start.values)
    assert torch.equal(found.ratio, start.ratio)
