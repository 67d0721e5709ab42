"""A training in several processes: gradients, losses and decisions are those of the global batch."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.errors import DataError, ProcessError
from qat.train import processes
from qat.train.data import Share, Split
from qat.train.state import Snapshot
from qat.train.sync_norm import synchronized_norms


def own_part(split: Split) -> Split:
    """Return the part of each batch of a training split that this process trains on.

    Raises:
        DataError: There are fewer images in a batch than processes.
    """
    check_batch_size(split.batch_size, processes.size())
    return split.sharded(Share(processes.rank(), processes.size(), "image"))


def check_batch_size(batch_size: int, size: int) -> None:
    """Check that every process gets an image of each batch.

    Raises:
        DataError: There are fewer images in a batch than processes.
    """
    if batch_size < size:
        raise DataError(
            f"a batch of {batch_size} images (data.batch_size, of all processes together) leaves some of {size} "
            "processes without any",
            f"give a batch_size of {size} or more, best a multiple of it, or start fewer processes",
        )


@dataclass(frozen=True)
class Part:
    """This process's part of a batch.

    Attributes:
        own: Its images.
        whole: Images of all processes.
        smallest: Images of the process that has fewest.
    """

    own: int
    whole: int
    smallest: int

    @property
    def weight(self) -> float:
        """What the loss of the part is multiplied with, so that the mean over the processes is that over the images."""
        return self.own * processes.size() / self.whole


def part_of_batch(count: int) -> Part:
    """Return this process's part, of `count` images, of the batch that all of them are about to train on."""
    counts = processes.of_each(count)
    return Part(count, sum(counts), min(counts))


def total(loss: Tensor, right: int, part: Part, *, bad: bool) -> tuple[float, int]:
    """Return the mean loss of the images of a batch, and how many were classified rightly, over all processes.

    Args:
        loss: Of this process's part, a scalar.
        right: In this process's part.
        part: The part.
        bad: This process's images hold nan or inf, for which it raises an error of its own.

    Raises:
        ProcessError: Another process has bad images.
    """
    value = float(loss.detach())
    if processes.size() == 1:
        return value, right
    losses, hits, failed = processes.summed([value * part.own, right, float(bad)])
    if failed and not bad:
        raise ProcessError("images of another process hold nan or inf", "see what it said")
    return losses / part.whole, int(hits)


def snapshot_of_first(find: Callable[[], Snapshot | None]) -> Snapshot | None:
    """Return, in every process, the state that the first one finds.

    Raises:
        ProcessError: The first one failed; it raises what `find` raises.
    """
    found: list[Snapshot | None] = []

    def tell() -> str:
        found.append(find())
        return json.dumps(None if found[0] is None else dict(found[0].info))

    info = json.loads(processes.text_of_first(tell))
    mine = found[0] if found else None
    if processes.size() == 1 or info is None:
        return mine
    return Snapshot(processes.tensors_of_first({} if mine is None else mine.tensors), info)


class Replica:
    """The model of this process, whose gradients become those of all processes in the backward pass.

    That is done by `DistributedDataParallel`, for it reduces while the backward pass goes on. Its graph is taken to be
    the same in every step (`static_graph`), so parameters that never get a gradient are no error; `renew` is called
    where that ends. Buffers are not broadcast: ranges and batch norms are reduced where they are made, and what
    observers hold must not be replaced. Several batches that make one step are each reduced, which averages the same
    sums. Nothing happens in a single process.

    Args:
        model: The model; its `state_dict` and modules stay what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._wrapped: DistributedDataParallel | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[tuple[str, ...]]:
        """Train with all processes, from the first one's state; gives the batch norms that do not take part in it."""
        with processes.answered(), synchronized_norms(self.model) as alone:
            processes.share_state(self.model)
            try:
                yield alone
            finally:
                self.renew()

    def renew(self) -> None:
        """Forget what was learnt about the graph: it changes, or a backward pass was left out."""
        self._wrapped = None

    def __call__(self, x: Tensor) -> Any:
        """Run the model; a backward pass must follow."""
        if processes.size() == 1:
            return self.model(x)
        if self._wrapped is None:
            index = None if x.device.index is None else [x.device.index]
            with warnings.catch_warnings():
                # torch 2.13 renames `broadcast_buffers`, and 2.10 has no other name for it
                warnings.simplefilter("ignore", FutureWarning)
                self._wrapped = DistributedDataParallel(
                    self.model, device_ids=index, broadcast_buffers=False, static_graph=True, init_sync=False
                )
        return self._wrapped(x)
