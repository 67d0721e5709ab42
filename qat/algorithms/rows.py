"""Rows of a weight that are rounded for what they compute: the best of several scales, then codes and scale in turns.

Sources: coordinate descent on the codes: Behdin et al., "QuantEase: Optimization-Based Quantization for Language
Models" (2023), section 3; a scale that fits the codes, in turns with them: Zhang et al., "COMQ: A Backpropagation-Free
Algorithm for Post-Training Quantization" (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: what a scale is tried with, itself first
CANDIDATES = (1.0, 1.1, 0.9, 0.8, 0.7, 0.6)
#: what a scale becomes at least and at most, as a multiple of what it was
LEAST, MOST = 0.25, 4.0
#: how far it may move in one turn
_TURN = (0.8, 1.25)
#: columns whose gradient is computed at a time; the result does not depend on it, but for rounding
_BLOCK = 128


@dataclass(frozen=True)
class Grid:
    """The grid of each element of a batch of matrices, float64, (G, R, K).

    Attributes:
        step: Distance of two values.
        zero_point: The code of zero.
        qmin: Smallest code.
        qmax: Largest code.
    """

    step: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def nearest(self, column: Tensor, index: Tensor) -> Tensor:
        """Round one column of each matrix, (G, R), given its number in each, (G,)."""
        step, zero = pick(self.step, index), pick(self.zero_point, index)
        return (torch.clamp(torch.round(column / step) + zero, self.qmin, self.qmax) - zero) * step

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes of values of the grid."""
        return (values / self.step).round() + self.zero_point

    def rows(self, where: Tensor) -> Grid:
        """Return the grid of some rows, by their numbers."""
        return Grid(self.step[:, where], self.zero_point[:, where], self.qmin, self.qmax)

    def scaled(self, ratio: Tensor) -> Grid:
        """Return the grid with another scale for each row, (G, R)."""
        return Grid(self.step * ratio[:, :, None], self.zero_point, self.qmin, self.qmax)


@dataclass(frozen=True)
class Fit:
    """Rounded rows.

    Attributes:
        values: On their grids, (G, R, K), float64.
        ratio: What the scale of each row was multiplied with, (G, R).
    """

    values: Tensor
    ratio: Tensor


#: rounds targets (G, R, K) to values of a grid; None where that has no solution
Rounder = Callable[[Tensor, Grid], Tensor | None]


def pick(matrix: Tensor, index: Tensor) -> Tensor:
    """Return one column of each of a batch of matrices: (G, R, K) and (G,) give (G, R)."""
    return matrix.gather(2, index[:, None, None].expand(-1, matrix.shape[1], 1)).squeeze(2)


def row_errors(change: Tensor, moments: Tensor) -> Tensor:
    """Return `d H d^T` of every row d of `change`, (G, R)."""
    return ((change @ moments) * change).sum(2)


def best_scales(target: Tensor, moments: Tensor, grid: Grid, rounder: Rounder, free: Tensor) -> Fit | None:
    """Round every row with each of the candidate scales, and keep the one with the least error.

    Rows that are not free are rounded with their own.

    Args:
        target: W, (G, R, K), float64.
        moments: H, positive definite, (G, K, K): the error of a row q is `(q - w) H (q - w)^T`.
        grid: The grid as it is.
        rounder: How rows are rounded.
        free: Which rows may get another scale, bool, (G, R).

    Returns:
        None where `rounder` has no solution.
    """
    if not bool(free.any()):
        values = rounder(target, grid)
        return None if values is None else Fit(values, torch.ones_like(target[:, :, 0]))
    count = len(CANDIDATES)
    factors = target.new_tensor(CANDIDATES).repeat(target.shape[1]).expand(len(target), -1)

    def spread(matrix: Tensor) -> Tensor:
        return matrix.repeat_interleave(count, 1)

    tried = Grid(spread(grid.step), spread(grid.zero_point), grid.qmin, grid.qmax).scaled(factors)
    values = rounder(spread(target), tried)
    if values is None:
        return None
    errors = row_errors(values - spread(target), moments).reshape(*target.shape[:2], count)
    least, best = errors.min(2)
    best = torch.where(free & (least < errors[:, :, 0]), best, 0)
    at = (best + count * torch.arange(best.shape[1], device=best.device))[:, :, None].expand(-1, -1, target.shape[2])
    return Fit(values.gather(1, at), target.new_tensor(CANDIDATES)[best])


def refine(target: Tensor, moments: Tensor, grid: Grid, fit: Fit, passes: int, free: Tensor) -> Fit:
    """Move one code after the other to where the error of its row is least, and the scales after them.

    No step raises the error of a row. It ends early where no code moves any more.

    Args:
        target: W, (G, R, K), float64.
        moments: H, positive definite, (G, K, K), as for `best_scales`.
        grid: The grid that `fit.ratio` refers to.
        fit: What to start from.
        passes: How often to go through all columns.
        free: Which rows may get another scale.
    """
    ratio = fit.ratio
    now = grid.scaled(ratio)
    steps = now.codes(fit.values) - now.zero_point
    for _ in range(passes):
        moved = _descend(target, moments, now, steps)
        turn = _scale_turn(target, moments, steps * now.step)
        ratio = torch.where(free, (ratio * turn).clamp(LEAST, MOST), ratio)
        now = grid.scaled(ratio)
        if not moved:
            break
    return Fit(steps * now.step, ratio)


def _descend(target: Tensor, moments: Tensor, grid: Grid, steps: Tensor) -> bool:
    """Go through all columns once, and change `steps`, codes less zero points, in place; tell whether any moved."""
    error = target - steps * grid.step
    moved = steps.new_zeros((), dtype=torch.bool)
    for start in range(0, target.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        inner = moments[:, block, block]
        pull = error @ moments[:, :, block]
        for k in range(pull.shape[2]):
            j = start + k
            step, zero, old = grid.step[:, :, j], grid.zero_point[:, :, j], steps[:, :, j].clone()
            wanted = old + pull[:, :, k] / (inner[:, k, k, None] * step)
            steps[:, :, j] = torch.clamp(torch.round(wanted) + zero, grid.qmin, grid.qmax) - zero
            change = (steps[:, :, j] - old) * step
            pull -= change[:, :, None] * inner[:, None, k]
            error[:, :, j] -= change
            moved |= change.any()
    return bool(moved)


def _scale_turn(target: Tensor, moments: Tensor, values: Tensor) -> Tensor:
    """Return what to multiply each row of values with so that its error is least, within `_TURN`."""
    along = values @ moments
    square, product = (along * values).sum(2), (along * target).sum(2)
    return torch.where(square > 0, product / torch.where(square > 0, square, 1.0), 1.0).clamp(*_TURN)
