"""The observer `auto`: for each tensor the range that the layers reading it can do with best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from qat import numerics
from qat.algorithms.replay import Region, Replay, is_float, region_of
from qat.graph.prepared import QUANTIZERS, PreparedModel, quantizer_key
from qat.observers import AutoObserver
from qat.quantizers import FakeQuantize
from qat.quantizers.static import fake_quantize


def auto_quantizers(chosen: Mapping[str, FakeQuantize]) -> dict[str, FakeQuantize]:
    """Return those quantizers whose range the consuming layers are to choose."""
    return {name: q for name, q in chosen.items() if q.fixed is None and isinstance(q.observer, AutoObserver)}


@torch.no_grad()
def choose_ranges(
    qmodel: PreparedModel, quantizers: Mapping[str, FakeQuantize], batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, str]:
    """Give each quantizer the candidate range with the least error after the layers that read its tensor.

    The candidates are those of `qat.observers.AutoObserver.candidates`. For each, everything between this quantizer and
    the next ones (a convolution with its batch norm and activation, say, or an addition) is computed with this one
    tensor fake-quantized and all else in float. The error of a candidate is the sum over the results of squared
    differences, each divided by the result's own sum of squares. Only these sums are kept from one batch to the next.
    Of equally good candidates the first one wins, `minmax` before all others.

    The time is that of as many forward passes as there are candidates, with those that give the same scale and zero
    point counted once.

    Args:
        qmodel: The model, in the phase `float` and in evaluation mode.
        quantizers: What to choose for, by name; each has observed its data, and its observer is an `AutoObserver`.
        batches: The inputs of the model, batch by batch.

    Returns:
        The chosen method by name of the tensor. A quantizer whose data never came, or that nothing reads, keeps what it
        has and is not in the result.
    """
    grids = {quantizer_key(name): _Grids(name, quantizer) for name, quantizer in quantizers.items()}
    calls = [node for node in qmodel.graph.nodes if _key(node) in grids and len(grids[_key(node)].names) > 1]
    regions = [region_of(call) for call in calls]
    for region in regions:
        grids[_key(region.call)].expect(region)
    replay = Replay(qmodel, regions)

    def visit(region: Region, value: Tensor, again: Callable[[Tensor], list[Any]], ends: list[Any]) -> None:
        grids[_key(region.call)].add(region, value, again, ends)

    if calls:
        for inputs in batches:
            replay.run(inputs, visit)
    return {name: method for name in quantizers if (method := grids[quantizer_key(name)].choose()) is not None}


def _key(node: fx.Node) -> str:
    """Return the key of the quantizer that a node calls; empty for other nodes."""
    return str(node.target).removeprefix(QUANTIZERS + ".") if node.meta.get("quantizes") is not None else ""


def _square_sum(x: Tensor) -> float:
    # one pass over memory; sums of float64 would take a third of the whole search
    return float(torch.linalg.vector_norm(x)) ** 2


class _Grids:
    """The candidates of one quantizer, and their errors so far."""

    def __init__(self, name: str, quantizer: FakeQuantize) -> None:
        self.name, self.quantizer = name, quantizer
        assert isinstance(quantizer.observer, AutoObserver)
        self.ranges = quantizer.observer.candidates(quantizer.scheme)
        self.names: list[str] = []
        self.grids: list[tuple[Tensor, Tensor]] = []
        for method, (low, high) in self.ranges.items():
            grid = numerics.range_to_scale(low, high, quantizer.scheme)
            if not any(torch.equal(grid[0], s) and torch.equal(grid[1], z) for s, z in self.grids):
                self.names.append(method)
                self.grids.append(grid)
        #: squared errors of each candidate, and then the sum of squares, by the end of a region
        self.sums: dict[fx.Node, Tensor] = {}

    def expect(self, region: Region) -> None:
        """Make room for the sums of a region: all processes must have the same, also those that get no batch."""
        for end in region.ends:
            self.sums[end] = torch.zeros(len(self.grids) + 1, dtype=torch.float64)

    def add(self, region: Region, value: Tensor, again: Callable[[Tensor], list[Any]], ends: list[Any]) -> None:
        """Take in one batch of one region."""
        scheme = self.quantizer.scheme
        for index, (scale, zero_point) in enumerate(self.grids):
            quantized = fake_quantize(value, scale, zero_point, *scheme.code_range, scheme.granularity)
            for end, want, have in zip(region.ends, ends, again(quantized), strict=True):
                if not is_float(want):
                    continue
                sums = self.sums[end]
                sums[index] += _square_sum(have - want)
                if index == 0:
                    sums[-1] += _square_sum(want)

    def choose(self) -> str | None:
        """Set the best range; return its method."""
        if len(self.names) == 1:
            best = 0
        else:
            told = [sums for sums in self._together() if float(sums[-1]) > 0.0]
            if not told:
                return None
            best = int(torch.stack([sums[:-1] / sums[-1] for sums in told]).sum(0).argmin())
        method = self.names[best]
        self.quantizer.set_range(*self.ranges[method], method)
        return method

    def _together(self) -> list[Tensor]:
        """Return the sums over all processes."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return list(self.sums.values())
        totals = []
        for sums in self.sums.values():
            total = sums.to(self.quantizer.scale.device)
            dist.all_reduce(total)
            totals.append(total.cpu())
        return totals
