"""Measuring a classifier on a split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import DataError
from qat.train import processes
from qat.train.data import Share, Split
from qat.train.progress import progress


@dataclass(frozen=True)
class Metrics:
    """How well a classifier does.

    Attributes:
        top1: Share of images whose most likely class is right, 0 to 1.
        top5: Share whose five most likely classes hold the right one; 1 where there are at most five classes.
        loss: Mean cross-entropy, nats.
        n: Number of images.
    """

    top1: float
    top5: float
    loss: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "n": self.n}


@contextlib.contextmanager
def evaluation_mode(model: Callable[..., Any]) -> Iterator[None]:
    """Put a module in evaluation mode and give every submodule its own mode back afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: Callable[..., Any]) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU for anything else."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def evaluate(
    model: Callable[[Tensor], Any],
    split: Split,
    *,
    quiet: bool = False,
    description: str = "evaluate",
    together: bool = False,
) -> Metrics:
    """Measure a classifier.

    Args:
        model: Module or callable from images (N, C, H, W) float32 to scores (N, classes); modules are run in
            evaluation mode and get their mode back.
        split: Labelled images.
        quiet: No progress bar.
        description: Text of the progress bar.
        together: Of several processes each takes some of the batches, and gets the result of all; all must call this.

    Raises:
        DataError: The split has no labels or no images, or the scores do not fit the labels.
    """
    if not split.labelled:
        raise DataError(f"the {split.name} split has no labels", "put the images in class folders or give labels")
    if together:
        split = split.sharded(Share(processes.rank(), processes.size(), "batch"))
    right = right5 = n = 0
    loss = 0.0
    device = device_of(model)
    with evaluation_mode(model), torch.no_grad():
        bar = progress(split, description=description, total=split.own_steps, quiet=quiet)
        for x, y in bar:
            scores = model(x.to(device))
            check_scores(scores, y, split.name)
            scores, y = scores.float(), y.to(device)
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            hits = best == y[:, None]
            right += int(hits[:, 0].sum())
            right5 += int(hits.any(1).sum())
            loss += float(functional.cross_entropy(scores, y, reduction="sum"))
            n += int(y.shape[0])
            bar.set_postfix_str(f"top-1 {100 * right / n:.2f} %", refresh=False)
    if together:
        *hits_of_all, loss, images = processes.summed([right, right5, loss, n])
        right, right5, n = int(hits_of_all[0]), int(hits_of_all[1]), int(images)
    if n == 0:
        raise DataError(f"the {split.name} split has no images", "give at least one")
    return Metrics(right / n, right5 / n, loss / n, n)


def check_scores(scores: object, y: Tensor, split: str) -> None:
    """Check that a model's result can be scored against labels.

    Raises:
        DataError: It is no tensor (N, classes), or a label is outside its classes.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[0] != y.shape[0]:
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(
            f"the model gives {given} for {y.shape[0]} images", "a classifier must give a tensor (N, classes)"
        )
    if int(y.max()) >= scores.shape[1] or int(y.min()) < 0:
        raise DataError(
            f"the {split} split has class {int(y.max())} but the model has {scores.shape[1]} classes",
            "correct the number of classes of the model or the labels of the data",
        )
