"""TensorBoard: losses, rates, the scales and ranges of quantizers, norms of gradients, numbers of hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qat.errors import QatError, StateError
from qat.graph.prepared import PreparedModel
from qat.quantizers import FakeQuantize
from qat.train.hooks import EpochRecord

if TYPE_CHECKING:
    from qat.train.log import StepRecord


def summary_writer() -> Callable[..., Any]:
    """Return torch's writer of event files.

    Raises:
        StateError: The package `tensorboard` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise StateError(
            f"tensorboard: true needs the package tensorboard ({error})", "pip install tensorboard"
        ) from None
    made: Callable[..., Any] = SummaryWriter
    return made


class Board:
    """Writes event files.

    Args:
        folder: Where.

    Raises:
        StateError: The package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._make = summary_writer()
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Begin, or go on, after so many batches; what was written for later ones is not shown any more."""
        self.close()
        self._writer = self._make(str(self.folder), purge_step=step + 1)

    def step(self, record: StepRecord, model: nn.Module) -> None:
        """Write a step: besides the record, what each quantizer and each parameter's gradient is like."""
        self._scalars(
            record.step,
            {
                "train/loss": record.loss,
                "train/top1": record.top1,
                "train/lr": record.lr,
                "train/gradient_norm": record.gradient_norm,
                **{f"hooks/{name}": value for name, value in record.metrics.items()},
                **quantizer_scalars(model),
                **{f"gradient/{k}": float(p.grad.norm()) for k, p in model.named_parameters() if p.grad is not None},
            },
        )

    def epoch(self, record: EpochRecord, step: int) -> None:
        """Write the end of an epoch."""
        values = {"epoch/loss": record.loss, "epoch/top1": record.top1}
        if record.validation_top1 is not None and record.validation_loss is not None:
            values |= {"validation/top1": record.validation_top1, "validation/loss": record.validation_loss}
        self._scalars(step, values)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def quantizer_scalars(model: nn.Module) -> dict[str, float]:
    """Return scale (the mean of several) and range of everything that is quantized, by `what/tensor`."""
    values: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            values[f"scale/{module.name}"] = float(module.scale.detach().mean())
            low, high = float(module.min_val.min()), float(module.max_val.max())
            if low <= high:
                values |= {f"range_min/{module.name}": low, f"range_max/{module.name}": high}
    if isinstance(model, PreparedModel):
        for name, quantizer, weight in model.weight_quantizers():
            # a weight's grid is made anew in every forward pass: its buffers have the one of the calibration
            with contextlib.suppress(QatError):
                encoding = quantizer.codes(weight)[1]
                values[f"scale/{name}"] = sum(encoding.scale) / len(encoding.scale)
                if encoding.min is not None and encoding.max is not None:
                    values |= {f"range_min/{name}": min(encoding.min), f"range_max/{name}": max(encoding.max)}
    return values
