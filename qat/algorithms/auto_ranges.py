"""The observer `auto`: for each tensor the range that the model's outputs, or the next layers, can do with best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from qat import numerics
from qat.algorithms.output_error import visit_gradients
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
    qmodel: PreparedModel, quantizers: Mapping[str, FakeQuantize], batches: Callable[[], Iterable[tuple[Tensor, ...]]]
) -> dict[str, str]:
    """Give each quantizer the candidate range with the least error, by its observer's `error`.

    The candidates are those of `qat.observers.AutoObserver.candidates`; those that give the same scale and zero point
    are rated once. Of equally good ones the first wins, `minmax` before all others. Only sums are kept from one batch
    to the next.

    `output`: the squared change of the model's outputs, to first order, with all else in float
    (`qat.algorithms.output_error`). It takes about as long as a step of training.

    `layer`: everything between this quantizer and the next ones (a convolution with its batch norm and activation, say,
    or an addition) is computed with this one tensor fake-quantized and all else in float. The error is the sum over
    the results of squared differences, each divided by the result's own sum of squares. It takes as long as so many
    forward passes as there are candidates.

    Args:
        qmodel: The model, in the phase `float` and in evaluation mode.
        quantizers: What to choose for, by name; each has observed its data, and its observer is an `AutoObserver`.
        batches: Gives the inputs of the model, batch by batch.

    Returns:
        The chosen method by name of the tensor. A quantizer whose data never came, or that nothing reads, keeps what it
        has and is not in the result.
    """
    grids = {name: _Grids(quantizer) for name, quantizer in quantizers.items()}
    open_ = {name: each for name, each in grids.items() if len(each.names) > 1}
    by_output = {name: each for name, each in open_.items() if each.by_output}
    by_layer = {quantizer_key(name): each for name, each in open_.items() if not each.by_output}
    if by_output:
        for each in by_output.values():
            each.expect("output")
        visit_gradients(
            qmodel,
            {name: each.quantizer for name, each in by_output.items()},
            batches(),
            {name: each.add_output for name, each in by_output.items()},
        )
    if by_layer:
        _replay(qmodel, by_layer, batches())
    return {name: method for name, each in grids.items() if (method := each.choose()) is not None}


def _replay(qmodel: PreparedModel, grids: Mapping[str, _Grids], batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Rate candidates by the errors of the layers that read them; `grids` by the quantizers' keys."""
    regions = [region_of(node) for node in qmodel.graph.nodes if _key(node) in grids]
    for region in regions:
        for end in region.ends:
            grids[_key(region.call)].expect(end)
    replay = Replay(qmodel, regions)

    def visit(region: Region, value: Tensor, again: Callable[[Tensor], list[Any]], ends: list[Any]) -> None:
        grids[_key(region.call)].add_layer(region, value, again, ends)

    for inputs in batches:
        replay.run(inputs, visit)


def _key(node: fx.Node) -> str:
    """Return the key of the quantizer that a node calls; empty for other nodes."""
    return str(node.target).removeprefix(QUANTIZERS + ".") if node.meta.get("quantizes") is not None else ""


def _square_sum(x: Tensor) -> float:
    # one pass over memory; sums of float64 would take a third of the whole search
    return float(torch.linalg.vector_norm(x)) ** 2


class _Grids:
    """The candidates of one quantizer, and their errors so far."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        self.quantizer = quantizer
        assert isinstance(quantizer.observer, AutoObserver)
        self.by_output = quantizer.observer.options["error"] == "output"
        self.ranges = quantizer.observer.candidates(quantizer.scheme)
        self.names: list[str] = []
        self.grids: list[tuple[Tensor, Tensor]] = []
        for method, (low, high) in self.ranges.items():
            grid = numerics.range_to_scale(low, high, quantizer.scheme)
            if not any(torch.equal(grid[0], s) and torch.equal(grid[1], z) for s, z in self.grids):
                self.names.append(method)
                self.grids.append(grid)
        #: squared errors of each candidate, and then what they are relative to, by where they were found
        self.sums: dict[fx.Node | str, Tensor] = {}

    def expect(self, place: fx.Node | str) -> None:
        """Make room for the sums of a place: all processes must have the same, also those that get no batch."""
        self.sums[place] = torch.zeros(len(self.grids) + 1, dtype=torch.float64)

    def add_layer(self, region: Region, value: Tensor, again: Callable[[Tensor], list[Any]], ends: list[Any]) -> None:
        """Take in one batch of one region."""
        for index, quantized in enumerate(self._quantized(value)):
            for end, want, have in zip(region.ends, ends, again(quantized), strict=True):
                if not is_float(want):
                    continue
                sums = self.sums[end]
                sums[index] += _square_sum(have - want)
                if index == 0:
                    sums[-1] += _square_sum(want)

    def add_output(self, value: Tensor, gradient: Tensor) -> None:
        """Take in one batch, with the gradient of the projected outputs."""
        sums = self.sums["output"]
        for index, quantized in enumerate(self._quantized(value)):
            changes = quantized.sub_(value).mul_(gradient).reshape(len(value), -1).sum(1, dtype=torch.float64)
            sums[index] += float(changes.square().sum())
        sums[-1] += len(value)

    def _quantized(self, value: Tensor) -> Iterator[Tensor]:
        scheme = self.quantizer.scheme
        for scale, zero_point in self.grids:
            yield fake_quantize(value, scale, zero_point, *scheme.code_range, scheme.granularity)

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
