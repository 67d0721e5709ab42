"""Scales by alternating least squares: codes for a scale, the best scale for those codes, and again."""

from __future__ import annotations

import torch
from torch import Tensor

#: how far a scale may fall before elements count that were left out
_MARGIN = 4.0


def alternate(
    values: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    codes: tuple[Tensor | float, Tensor | float],
    iterations: int,
    epsilon: float = 0.0,
) -> Tensor:
    """Return scales after so many turns of `q = clip(round(x / s)), s = sum q x / sum q^2`.

    MNN calls it ADMM; there are no multipliers in it. The error never grows, and since there are finitely many codes a
    fixed point is reached, usually after some dozens of turns; from there on nothing changes, so the turns end.

    Args:
        values: Elements, (C, N), float64.
        weights: How many there are of each, likewise; None for one.
        scale: Scales to start from, (C,), float64, positive.
        codes: Smallest and largest code relative to zero's, each a number or (C,).
        iterations: Most turns.
        epsilon: Added to the scale that divides and to the sum that does, as MNN does for weights.

    Returns:
        (C,), float64, positive: where all codes become zero, the last scale by which they were not.
    """
    lowest, highest = (torch.as_tensor(end, dtype=torch.float64).reshape(-1).expand(len(values)) for end in codes)
    # what is nearer to zero than half a step has the code 0 and no part in the sums, so it can go until scales fall
    least = float(scale.min()) / _MARGIN
    far = (values.abs() >= least / 2).any(0)
    if bool(far.all()):
        return _turns(values, weights, scale, lowest, highest, iterations, epsilon, 0.0)[0]
    fewer = values[:, far], None if weights is None else weights[:, far]
    found, fell = _turns(*fewer, scale, lowest, highest, iterations, epsilon, least)
    return _turns(values, weights, scale, lowest, highest, iterations, epsilon, 0.0)[0] if fell else found


def _turns(
    values: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    iterations: int,
    epsilon: float,
    least: float,
) -> tuple[Tensor, bool]:
    """Return the scales, and whether one of them fell below `least`, upon which they mean nothing."""
    scale = scale.clone()
    moving = torch.arange(len(values))
    x, s, least_code, most_code = values, scale, lowest[:, None], highest[:, None]
    for _ in range(iterations):
        if float(s.min()) < least:
            return scale, True
        steps = x / (s[:, None] + epsilon)
        # half away from zero, as C's round
        q = steps.abs().add_(0.5).floor_().copysign_(steps)
        q = torch.minimum(torch.maximum(q, least_code), most_code)
        weighted = q if weights is None else q * weights
        norm = torch.linalg.vecdot(q, weighted)
        new = torch.linalg.vecdot(x, weighted) / (norm + epsilon).clamp(min=1e-300)
        new = torch.where((norm > 0) & (new > 0), new, s)
        changed = new != s
        scale[moving] = new
        if bool(changed.all()):
            s = new
            continue
        moving = moving[changed]
        if not len(moving):
            break
        x, s, least_code, most_code = x[changed], new[changed], least_code[changed], most_code[changed]
        weights = None if weights is None else weights[changed]
    return scale, False
