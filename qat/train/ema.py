"""A moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.errors import CheckpointError


class WeightAverage:
    """Exponential moving average of a model's parameters and batch norm statistics.

    Everything else, ranges of activations among it, is taken from the model as it is: a scale that followed from a
    range must stay with it. `average = d * average + (1 - d) * value` with `d = min(decay, (1 + n) / (10 + n))` after
    n steps, so that a short training is not held back by where it began.

    Source: Polyak and Juditsky 1992; the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage.

    Args:
        model: The model; the average begins with its values.
        decay: 0 to 1, mostly near 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._values = _averaged(model)
        self._average = {name: value.detach().clone() for name, value in self._values.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's values in, after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._values.values()), 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average while the block runs."""
        own = {name: value.detach().clone() for name, value in self._values.items()}
        self.store()
        try:
            yield
        finally:
            _copy(self._values, own)

    def store(self) -> None:
        """Give the model the average for good."""
        _copy(self._values, self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, and how many steps are in it."""
        return {**self._average, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: It is of another model.
        """
        if set(tensors) != {*self._average, "updates"}:
            raise CheckpointError("the average of the weights is of another model", "resume with the same recipe")
        self.updates = int(tensors["updates"])
        _copy(self._average, tensors)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    norms = {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key, value in module.named_buffers(recurse=False)
        if value.is_floating_point()
    }
    return {**dict(model.named_parameters()), **norms}


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in to.items():
        target.copy_(values[name])
