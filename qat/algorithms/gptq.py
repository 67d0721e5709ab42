"""GPTQ: weights are rounded column by column, and those that are left make up for the error so far.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023),
section 3; Frantar and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), section 5. What comes after it, and the
choice of scales: `qat.algorithms.rows`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.algorithms.correction import corrected, correction_damping, damp, input_pairs
from qat.algorithms.rounding import (
    Rounded,
    Rounding,
    UnitRounding,
    check_option,
    count_samples,
    refuse_nonfinite,
    roundable,
    take_over,
)
from qat.algorithms.rows import CANDIDATES, LEAST, Fit, Grid, best_scales, refine
from qat.algorithms.sweep import DEFAULT_MEMORY, Visit, gather, sweep
from qat.algorithms.unfolded import Moments, WeightMatrix
from qat.algorithms.units import Layer, layer_units
from qat.errors import QuantizationWarning
from qat.graph.prepared import PreparedModel
from qat.numerics import SCALE_FLOOR

Order = Literal["activation", "natural"]

#: how often damping is multiplied by ten where the second moments are singular all the same
_TRIALS = 4
#: elements of the rows that are rounded at a time, candidate scales included
_ELEMENTS = 1 << 23


def gptq(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "activation",
    correct: bool = True,
    fit_scales: bool = True,
    passes: int = 4,
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
) -> Rounding:
    """Round the weights of a calibrated model so that each layer's output changes little, and fix them on their grids.

    Layers are rounded in order; the inputs of each are those of the quantized path.

    Args:
        qmodel: The calibrated model, which is changed: its weights become values of their grids.
        batches: As for `calibrate`.
        damping: Share of the mean diagonal of the second moments that is added to the diagonal.
        block_size: Columns after which the error is spread over all the others; the result does not depend on it, but
            for rounding.
        order: Of the columns: `activation`, those with the largest inputs first, or `natural`.
        correct: Before rounding, change the weights so that they also make up for the error of what the layer reads
            (the least squares solution for the output of the float model); and where the layer has a bias (or a batch
            norm), let that take the mean error of every channel, which the weights then need not do.
        fit_scales: Where each output channel has a scale of its own (and it need not be a power of two), choose the
            scale too, for the error of what the channel computes. False: the grids stay as they are.
        passes: How often, after all columns are rounded, each code moves once more to where the error is least, given
            all others; 0 for never. The original algorithm is `correct=False, fit_scales=False, passes=0`.
        samples: Take at most as many; None for all.
        memory: Bytes for activations (see `gather`); fewer samples are taken where they do not fit.
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        The error of every layer before and after.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, has no quantized weight, or an option is out of range.
    """
    check_option(0 < damping < 1, "damping", damping, "give a share in (0, 1)")
    check_option(block_size >= 1, "block_size", block_size, "give a positive number")
    check_option(order in ("activation", "natural"), "order", order, "choose activation or natural")
    check_option(passes >= 0, "passes", passes, "give 0 or more")
    method = _Method(damping, block_size, order, correct, fit_scales, passes)
    units = roundable(qmodel, layer_units(qmodel, "activation"))
    data = gather(qmodel, batches, samples=samples, memory=memory)
    count = count_samples(qmodel, data, "gptq")
    results: list[UnitRounding] = []

    def visit(found: Visit) -> None:
        refuse_nonfinite(found)
        (layer,) = found.unit.layers
        rounded = _rounded(found, layer, method)
        if rounded is None:
            error = found.error()
            results.append(UnitRounding(found.unit.name, (layer.key,), error, error, kept=True))
        else:
            results.append(take_over(found, rounded, "gptq"))

    sweep(qmodel, data, units, visit, float_model=float_model, progress=progress, title="gptq")
    return Rounding("gptq", tuple(results), count)


@dataclass(frozen=True)
class _Method:
    """The options of `gptq` that say how a layer is rounded."""

    damping: float
    block_size: int
    order: Order
    correct: bool
    fit_scales: bool
    passes: int


def _rounded(visit: Visit, layer: Layer, method: _Method) -> Rounded | None:
    """Return what to make of a layer's weight, or None (with a warning) where it has no such solution."""
    form = WeightMatrix(layer.op, tuple(layer.weight.shape))
    steps, step, zero_point = layer.quantizer.steps(layer.weight)
    weight, step, zero_point = (form.matrix(t).to(torch.float64) for t in (steps * step, step, zero_point))
    moments = form.moments(input_pairs(visit))
    # a mean error is the bias's to mend, not the weight's
    shifted = method.correct and layer.offset(visit.root) is not None
    second = moments.second_about if shifted else moments.second
    target = weight
    if method.correct:
        damping = correction_damping(visit, form, method.damping)
        target = corrected(weight, second, moments.cross_about if shifted else moments.cross, damping)
    grid = Grid(step, zero_point, layer.quantizer.qmin, layer.quantizer.qmax)
    scale = layer.quantizer.folded_grid(layer.weight)[0]
    free = torch.zeros_like(weight[:, :, 0], dtype=torch.bool)
    if method.fit_scales and layer.quantizer.has_free_scales:
        seen = second.diagonal(dim1=1, dim2=2).amax(1) > 0
        free = seen[:, None] & (scale.reshape(form.groups, -1) > SCALE_FLOOR / LEAST)
    fit = _fit(target, second, grid, method, free)
    if fit is None:
        warnings.warn(
            f"the inputs of {layer.name!r} are degenerate; {layer.key!r} stays rounded to nearest",
            QuantizationWarning,
            stacklevel=2,
        )
        return None
    codes = form.weight(grid.scaled(fit.ratio).codes(fit.values)).to(torch.int32)
    scales = {layer.key: (scale * fit.ratio.reshape(scale.shape)).to(torch.float32)} if bool(free.any()) else {}
    shifts = {layer.key: _shift(layer, weight, fit.values, moments)} if shifted else {}
    return Rounded({layer.key: codes}, weight_scales=scales, shifts=shifts)


def _shift(layer: Layer, weight: Tensor, values: Tensor, moments: Moments) -> Tensor:
    """Return the mean error of each output channel, (output channels,), that the rounded weight leaves."""
    quantized, reference = moments.quantized, moments.quantized + moments.difference
    mean = (weight @ reference[:, :, None] - values @ quantized[:, :, None]).flatten()
    gain = layer.gain()
    return mean if gain is None else mean * gain


def _fit(weight: Tensor, moments: Tensor, grid: Grid, method: _Method, free: Tensor) -> Fit | None:
    """Round all rows, some of them at a time; those that are `free` may get another scale."""

    def rounder(target: Tensor, grid: Grid) -> Tensor | None:
        return solve(
            target, moments, grid.nearest, damping=method.damping, block_size=method.block_size, order=method.order
        )

    groups, rows, columns = weight.shape
    damped, fits = damp(moments, method.damping), []
    size = max(1, _ELEMENTS // (groups * columns * len(CANDIDATES)))
    for some in torch.split(torch.arange(rows, device=weight.device), size):
        target, own, may = weight[:, some], grid.rows(some), free[:, some]
        fit = best_scales(target, damped, own, rounder, may)
        if fit is None:
            return None
        fits.append(refine(target, damped, own, fit, method.passes, may))
    return Fit(torch.cat([fit.values for fit in fits], 1), torch.cat([fit.ratio for fit in fits], 1))


def solve(
    weight: Tensor,
    moments: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    *,
    damping: float,
    block_size: int,
    order: Order,
) -> Tensor | None:
    """Round matrices W column by column so that `tr((Q - W) H (Q - W)^T)` stays small.

    Args:
        weight: (G, R, K), float64.
        moments: H, (G, K, K), float64: second moments of the inputs.
        nearest: Rounds a column, given as (G, R) and its number in each matrix, (G,).
        damping: See `gptq`.
        block_size: See `gptq`.
        order: See `gptq`.

    Returns:
        Q, (G, R, K), or None where H is singular with all damping.
    """
    groups, _, columns = weight.shape
    diagonal = moments.diagonal(dim1=1, dim2=2)
    sequence = torch.arange(columns, device=weight.device).expand(groups, -1)
    if order == "activation":
        sequence = diagonal.argsort(dim=1, descending=True, stable=True)
    weight = weight.gather(2, sequence[:, None, :].expand_as(weight)).clone()
    moments = moments.gather(1, sequence[:, :, None].expand_as(moments))
    moments = moments.gather(2, sequence[:, None, :].expand_as(moments))
    factor = _inverse_factor(moments, damping)
    if factor is None:
        return None
    rounded = torch.empty_like(weight)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = []
        for k in range(start, stop):
            rounded[:, :, k] = nearest(weight[:, :, k], sequence[:, k])
            error = (weight[:, :, k] - rounded[:, :, k]) / factor[:, k, k, None]
            weight[:, :, k:stop] -= error[:, :, None] * factor[:, None, k, k:stop]
            errors.append(error)
        weight[:, :, stop:] -= torch.stack(errors, 2) @ factor[:, start:stop, stop:]
    return torch.empty_like(rounded).scatter_(2, sequence[:, None, :].expand_as(rounded), rounded)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped moments."""
    for trial in range(_TRIALS):
        lower, failed = torch.linalg.cholesky_ex(damp(moments, damping * 10**trial))
        if not bool(failed.any()):
            inverse: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(inverse[1].any()):
                return inverse[0]
    return None
