"""Non-uniform quantization: the weights of a layer use only 16 or 32 of their 256 codes.

This is the AMCT toolkit's NUQ (`nuq_quantize` with `num_steps` and `num_of_iteration`), for compilers that compress
such weights. Its clustering is not published; here it is weighted k-means on the codes, which in one dimension has an
exact solution (Wang and Song, "Ckmeans.1d.dp", The R Journal 2011), with the error of the layer's output as the
objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.algorithms.correction import input_pairs
from qat.algorithms.gptq import solve
from qat.algorithms.rounding import (
    Rounded,
    Rounding,
    UnitRounding,
    check_option,
    count_samples,
    refuse_nonfinite,
    roundable,
    set_rounding,
)
from qat.algorithms.rows import pick
from qat.algorithms.sweep import DEFAULT_MEMORY, Visit, gather, sweep
from qat.algorithms.unfolded import WeightMatrix
from qat.algorithms.units import Layer, layer_units
from qat.errors import StateError
from qat.graph.prepared import PreparedModel

_BITS = 8


@dataclass(frozen=True)
class NonUniform:
    """The result of `nuq`.

    Attributes:
        rounding: The error of every layer before and after.
        clusters: The codes that each weight uses, ascending, by its `state_dict` key (AMCT's record field `cluster`).
    """

    rounding: Rounding
    clusters: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        return str(self.rounding)


def nuq(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    steps: int = 32,
    iterations: int = 1,
    damping: float = 0.01,
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
) -> NonUniform:
    """Restrict the 8-bit weights of each layer of a calibrated model to a few codes, and fix them on their grids.

    In each iteration the codes are chosen that minimise `sum(h_k s**2 (q - c)**2)` over the weights, where h_k is the
    mean square of what a weight is multiplied with and s its scale; then each weight takes one of them, column by
    column as in GPTQ. Further iterations choose codes for the weights as that has shifted them. The best one is taken,
    also where plain 8-bit weights have a smaller error: the restriction is what was asked for.

    Args:
        qmodel: The calibrated model, which is changed.
        batches: As for `calibrate`.
        steps: How many codes a weight may use: 16 or 32 (AMCT's `num_steps`).
        iterations: See above (AMCT's `num_of_iteration`).
        damping: As for `gptq`.
        samples: Take at most as many; None for all.
        memory: Bytes for activations (see `gather`); fewer samples are taken where they do not fit.
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, has no quantized weight, or one that has not 8 bits; or an option is
            out of range.
    """
    check_option(steps in (16, 32), "steps", steps, "choose 16 or 32")
    check_option(iterations >= 1, "iterations", iterations, "give a positive number")
    check_option(0 < damping < 1, "damping", damping, "give a share in (0, 1)")
    units = roundable(qmodel, layer_units(qmodel, "activation"))
    for layer in (layer for unit in units for layer in unit.layers):
        if layer.quantizer.scheme.int_type.bits != _BITS:
            raise StateError(
                f"{layer.key!r} is {layer.quantizer.scheme.dtype} and {steps} of 256 codes were asked for",
                "quantize weights to int8",
            )
    data = gather(qmodel, batches, samples=samples, memory=memory)
    count = count_samples(qmodel, data, "nuq")
    results: list[UnitRounding] = []
    clusters: dict[str, tuple[int, ...]] = {}

    def visit(found: Visit) -> None:
        refuse_nonfinite(found)
        (layer,) = found.unit.layers
        before, weight = found.error(), layer.weight.detach().clone()
        best: tuple[float, Tensor] | None = None
        for codes in _candidates(found, layer, steps, iterations, damping):
            set_rounding(found, Rounded({layer.key: codes}), "nuq")
            error = found.error()
            if best is None or error < best[0]:
                best = error, codes
        assert best is not None
        layer.weight.copy_(weight)
        set_rounding(found, Rounded({layer.key: best[1]}), "nuq")
        clusters[layer.key] = tuple(sorted(set(best[1].flatten().tolist())))
        results.append(UnitRounding(found.unit.name, (layer.key,), before, best[0]))

    sweep(qmodel, data, units, visit, float_model=float_model, progress=progress, title="nuq")
    return NonUniform(Rounding("nuq", tuple(results), count), clusters)


def _candidates(visit: Visit, layer: Layer, steps: int, iterations: int, damping: float) -> list[Tensor]:
    """Return the codes after each iteration."""
    form = WeightMatrix(layer.op, tuple(layer.weight.shape))
    in_steps, step, zero_point = layer.quantizer.steps(layer.weight)
    matrix, step, zero = (form.matrix(t).to(torch.float64) for t in (in_steps, step, zero_point))
    moments = form.moments(input_pairs(visit)).second
    importance = moments.diagonal(dim1=1, dim2=2)[:, None, :] * step.square()
    low, high = layer.quantizer.qmin, layer.quantizer.qmax
    wanted, found = matrix + zero, []
    for _ in range(iterations):
        levels = cluster(wanted.clamp(low, high), importance, steps, low, high)

        def nearest(column: Tensor, index: Tensor, levels: Tensor = levels) -> Tensor:
            s, z = pick(step, index), pick(zero, index)
            return (_nearest(column / s + z, levels) - z) * s

        plain = _nearest(matrix + zero, levels)
        found.append(plain)
        rounded = solve(matrix * step, moments, nearest, damping=damping, block_size=128, order="activation")
        if rounded is None:
            break
        found.append((rounded / step).round() + zero)
        # where each weight went, the codes of the next iteration should be better for
        wanted = matrix + zero + (found[-1] - plain)
    return [form.weight(codes).to(torch.int32) for codes in found]


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(values, middles)]


def cluster(values: Tensor, importance: Tensor, count: int, low: int, high: int) -> Tensor:
    """Return the integers that minimise the weighted squared distance of values to the nearest of them.

    Values are counted by their nearest integer, which makes the exact solution a dynamic programme over intervals of
    integers, each represented by the integer nearest to its weighted mean.

    Args:
        values: Any shape, in [low, high].
        importance: Not negative, of the same shape.
        count: How many integers at most.
        low: Smallest one.
        high: Largest one.

    Returns:
        Ascending, float64, at most `count`.
    """
    bins = (values.round() - low).long().flatten()
    size = high - low + 1
    weight = torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, bins, importance.flatten())
    places = torch.arange(low, high + 1, dtype=torch.float64, device=values.device)
    # where no input was ever seen every value counts alike
    weight = weight if bool(weight.sum() > 0) else torch.bincount(bins, minlength=size).to(torch.float64)
    sums = [torch.cat([weight.new_zeros(1), (weight * places**p).cumsum(0)]) for p in range(3)]
    # cost[i, j]: of the integers i ... j - 1 as one cluster
    mass, first, second = (s[None, :] - s[:, None] for s in sums)
    centre = torch.where(mass > 0, (first / torch.where(mass > 0, mass, 1.0)).round(), places.new_tensor(float(low)))
    cost = second - 2 * centre * first + centre.square() * mass
    cost = torch.where(torch.ones_like(cost).triu(1) > 0, cost.clamp(min=0), torch.inf)
    best, cuts = cost[0], []
    for _ in range(count - 1):
        lower, at = (best[:, None] + cost).min(0)
        cuts.append(torch.where(lower < best, at, -1))
        best = torch.minimum(lower, best)
    return _centres(cuts, centre, mass, size)


def _centres(cuts: list[Tensor], centre: Tensor, mass: Tensor, size: int) -> Tensor:
    """Follow the cuts back from the last cluster."""
    found, end = [], size
    for cut in reversed([None, *cuts]):
        at = -1 if cut is None else int(cut[end])
        if cut is not None and at < 0:
            continue
        start = max(at, 0)
        if float(mass[start, end]) > 0:
            found.append(centre[start, end])
        end = start
    levels: Tensor = torch.unique(torch.stack(found))
    return levels
