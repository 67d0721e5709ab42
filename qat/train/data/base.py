"""The one interface of all data: a `Split` gives batches of an epoch, `Data` has the splits of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from qat.errors import DataError

#: images (N, C, H, W) float32 and class numbers (N,) int64; the class number of an unlabelled image is -1
Batch = tuple[Tensor, Tensor]


@dataclass
class Skipped:
    """The files that were skipped because they could not be read, in the order of their first failure."""

    files: dict[str, str] = field(default_factory=dict)

    def add(self, file: str, cause: str) -> None:
        """Note a file once."""
        self.files.setdefault(file, cause)

    def summary(self) -> str:
        """Return one line, or "" where nothing was skipped."""
        if not self.files:
            return ""
        names = list(self.files)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"skipped {len(names)} unreadable file{'s' * (len(names) > 1)}: {', '.join(names[:3])}{more}"


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of a split.

    Attributes:
        rank: Number of the process, from 0.
        size: Number of processes.
        by: `image`: a part of every batch, none where a batch has too few images; the parts differ by one image at
            most. `batch`: every `size`-th batch, whole.
    """

    rank: int = 0
    size: int = 1
    by: Literal["image", "batch"] = "image"

    def of(self, number: int, index: Tensor) -> Tensor | None:
        """Return the part of the batch `number`, given its indices; None where it is for other processes."""
        if self.by == "batch":
            return index if number % self.size == self.rank else None
        n = len(index)
        return index[n * self.rank // self.size : n * (self.rank + 1) // self.size]


@dataclass(frozen=True)
class Split:
    """Images that can be gone through again and again.

    Attributes:
        name: `train`, `calibration` or `test`.
        n: Number of images.
        batch_size: Images in a batch.
        batches: Gives the batches of an epoch; the same epoch always gives the same batches.
        labelled: Whether the class numbers mean something.
        drop_last: Whether a last, smaller batch is left out.
        batches_from: Gives the batches of an epoch from a later one on, the very same as `batches` would, without
            making the earlier ones; None where that cannot be.
        shares_from: Gives a share of the batches of an epoch from one on, without making what is not of it; None where
            that cannot be.
        share: What this process takes; `n`, `batch_size` and `steps` are those of all processes together.
    """

    name: str
    n: int
    batch_size: int
    batches: Callable[[int], Iterator[Batch]]
    labelled: bool = True
    drop_last: bool = False
    batches_from: Callable[[int, int], Iterator[Batch]] | None = None
    shares_from: Callable[[int, int, Share], Iterator[Batch]] | None = None
    share: Share = Share()

    def __iter__(self) -> Iterator[Batch]:
        return self.remaining(0, 0)

    def sharded(self, share: Share) -> Split:
        """Return the part of the split that one of several processes takes."""
        return replace(self, share=share)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    @property
    def own_steps(self) -> int:
        """Batches in an epoch of which this process has something."""
        return self.steps if self.share.by == "image" else len(range(self.share.rank, self.steps, self.share.size))

    def remaining(self, epoch: int, first: int) -> Iterator[Batch]:
        """Give the batches of an epoch without its first `first` ones, which are made and dropped only if need be."""
        if self.share.size > 1:
            if self.shares_from is not None:
                return self.shares_from(epoch, first, self.share)
            return self._cut(replace(self, share=Share()).remaining(epoch, first), first)
        if first == 0:
            return self.batches(epoch)
        if self.batches_from is not None:
            return self.batches_from(epoch, first)
        return itertools.islice(self.batches(epoch), first, None)

    def _cut(self, batches: Iterator[Batch], first: int) -> Iterator[Batch]:
        """Cut this process's share out of whole batches."""
        for number, (x, y) in enumerate(batches, first):
            part = self.share.of(number, torch.arange(len(y)))
            if part is not None:
                yield x[part], y[part]

    def images(self, count: int | None = None) -> Iterator[Tensor]:
        """Give batches of images only, `count` images in all, or every image where there are fewer.

        Of a split that is shared by batches, the processes give `count` images together, or fewer where files are
        skipped.
        """
        wanted = self.n if count is None else count
        if self.share.size > 1:
            numbers = range(self.share.rank, self.steps, self.share.size)
            for number, (x, _) in zip(numbers, self, strict=False):
                if number * self.batch_size >= wanted:
                    return
                yield x[: wanted - number * self.batch_size]
            return
        left = wanted
        for x, _ in self.batches(0):
            if left <= 0:
                return
            yield x[:left]
            left -= x.shape[0]

    def sample(self, count: int = 1) -> Tensor:
        """Return the first images, at most `count`.

        Raises:
            DataError: No image can be read.
        """
        parts = list(self.images(count))
        if not parts:
            raise DataError(f"the {self.name} split has no readable image", "give at least one")
        return torch.cat(parts)


@dataclass(frozen=True)
class Data:
    """The splits of a data set.

    Attributes:
        train: Shuffled and augmented; None where there are no training images.
        calibration: In a fixed random order, never augmented.
        test: In order; None where there are no test images.
        validation: Training images that were held out, in order, never augmented; None where none were asked for.
        num_classes: Number of classes; 0 where nothing is labelled.
        input_shape: (C, H, W) of one image.
        skipped: Files that were skipped so far.
    """

    train: Split | None
    calibration: Split
    test: Split | None
    num_classes: int
    input_shape: tuple[int, int, int]
    validation: Split | None = None
    skipped: Skipped = field(default_factory=Skipped)


def generator(seed: int, epoch: int, item: int = 0) -> torch.Generator:
    """Return the random generator of one epoch (and image), so that any batch can be made again alone."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + item * 0x94D049BB133111EB) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def fixed_subset(n: int, limit: int | None, seed: int) -> Tensor:
    """Return the sorted indices of at most `limit` of `n` images, drawn evenly by the seed."""
    if limit is None or limit >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=generator(seed, 0))[:limit].sort().values


def held_out(n: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sorted indices that stay for training and those held out for validation, drawn by the seed.

    Raises:
        DataError: Nothing would stay.
    """
    if count >= n:
        raise DataError(f"data.validation holds out {count} of {n} training images", "leave some to train on")
    drawn = torch.randperm(n, generator=generator(seed, 0, 1))
    return drawn[count:].sort().values, drawn[:count].sort().values


def index_batches(
    n: int, batch_size: int, order: Tensor, drop_last: bool, first: int = 0, share: Share | None = None
) -> Iterator[Tensor]:
    """Give the indices of each batch, or of a share of it, which may be empty; from the batch `first` on."""
    stop = n - n % batch_size if drop_last else n
    for start in range(first * batch_size, stop, batch_size):
        index = order[start : start + batch_size]
        part = index if share is None else share.of(start // batch_size, index)
        if part is not None:
            yield part


def empty_batch() -> Batch:
    """Return a batch without images, for a process that has none of a batch that others have."""
    return torch.empty(0), torch.empty(0, dtype=torch.int64)
