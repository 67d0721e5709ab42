"""The native step of the tracking of oscillating weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.native.operators import below_autograd
from qat.native.ranges import BatchNormFactor


class OscillationState(NamedTuple):
    """What is remembered of each element of a weight, in its shape and order of memory.

    Attributes:
        codes: int16, those of the last step.
        direction: int8, 1 or -1 as the code last rose or fell; 0 where it never changed.
        average: float32, of the codes.
        frequency: float32, of oscillations a step.
        frozen: bool.
        held: float32, the code, or the value, of what is frozen.
    """

    codes: Tensor
    direction: Tensor
    average: Tensor
    frequency: Tensor
    frozen: Tensor
    held: Tensor


def oscillation_step(
    weight: Tensor,
    state: OscillationState,
    grid: tuple[Tensor, Tensor],
    factor: BatchNormFactor | None,
    qmin: int,
    qmax: int,
    momentum: float,
    threshold: float | None,
    spares_ends: bool,
    by_value: bool,
) -> None:
    """Take in a weight after a step and freeze elements of it, bit for bit as `qat.train.oscillation_step` in PyTorch.

    Weight and state are written.

    Args:
        weight: float32 on a CPU, dense, one output channel (dimension 0) after the other.
        state: Of this weight.
        grid: Scale and zero point of `weight * factor`, one value each or one an output channel.
        factor: Where the factor comes from, by channels of dimension 0; None for none.
        qmin: Smallest code.
        qmax: Largest code.
        momentum: Of average and frequency.
        threshold: Frequency above which an element is frozen; None for none.
        spares_ends: Elements at the ends of the codes are not frozen.
        by_value: What is held is the value of a weight and not its code.
    """
    norm = (None, None, 0.0, 0.0) if factor is None else factor[:4]
    below_autograd(
        torch.ops.qat.oscillation_step.default,
        weight, *state, *grid, *norm, qmin, qmax, momentum, threshold, spares_ends, by_value,
    )  # fmt: skip
    # autograd's own kernel, which is left out above, would count the change
    torch.autograd.graph.increment_version(weight)


def register() -> None:
    """Register the fake kernel, once, after the library is loaded."""
    torch.library.register_fake("qat::oscillation_step", _fake)


def _fake(*_: Tensor | float | None) -> None:
    """Nothing is returned."""
