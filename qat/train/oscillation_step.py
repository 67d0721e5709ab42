"""What one step of the optimizer does to the memory of a weight's codes, and which elements are frozen.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), algorithm 1;
`qat.train.oscillation` says where it differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat import native
from qat.native import OscillationState
from qat.quantizers import WeightFakeQuantize

#: elements
_IN_CACHE = 1 << 15


@dataclass(frozen=True)
class OscillationRule:
    """How codes are remembered and elements are frozen in a step.

    Attributes:
        momentum: Of average and frequency.
        threshold: Frequency above which an element is frozen; None for none.
    """

    momentum: float
    threshold: float | None


def first_state(codes: Tensor) -> OscillationState:
    """Return the state of a weight before any step; `codes` are whole numbers."""
    return OscillationState(
        codes=codes.to(torch.int16),
        direction=torch.zeros_like(codes, dtype=torch.int8),
        average=codes.to(torch.float32),
        frequency=torch.zeros_like(codes, dtype=torch.float32),
        frozen=torch.zeros_like(codes, dtype=torch.bool),
        held=torch.zeros_like(codes, dtype=torch.float32),
    )


def start(quantizer: WeightFakeQuantize, weight: Tensor) -> OscillationState:
    """Return the state of a weight that is seen for the first time."""
    steps, _, zero_point = quantizer.steps(weight)
    return first_state(torch.clamp(torch.round(steps) + zero_point, quantizer.qmin, quantizer.qmax))


def take_in(
    quantizer: WeightFakeQuantize, weight: Tensor, state: OscillationState, rule: OscillationRule
) -> OscillationState:
    """Take in the codes of a weight after a step and freeze elements of it; the weight is written.

    Args:
        quantizer: Of the weight.
        weight: The float weight.
        state: What was returned for it before; it may be written.
        rule: How.

    Returns:
        The state after the step.
    """
    own_grid = quantizer.follows or quantizer.method.transforms
    if own_grid:
        # what is held must have no part in the grid
        weight.masked_fill_(state.frozen, 0.0)
    by_value = holds_values(quantizer)
    grid = _grid_by_row(quantizer, weight)
    if grid is None:
        _in_parts(quantizer, weight, state, rule, own_grid, by_value)
        return state
    # a state that was loaded is contiguous, whatever its weight is
    state = OscillationState(*(_in_order_of(weight, value) for value in state))
    native.oscillation_step(
        weight, state, grid, quantizer.native_factor(), quantizer.qmin, quantizer.qmax, rule.momentum, rule.threshold,
        own_grid, by_value,
    )  # fmt: skip
    return state


def holds_values(quantizer: WeightFakeQuantize) -> bool:
    """Whether what is frozen is the value of a weight and not its code."""
    tied = quantizer.follows_batch_norm or quantizer.follows or quantizer.method.transforms
    return quantizer.batch_norm is not None and not tied


def _grid_by_row(quantizer: WeightFakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return scale and zero point, one value or one a row; None for what the extension does not have."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not native.runs_on(weight.device):
        return None
    if quantizer.method.transforms:
        return None
    granularity = quantizer.scheme.granularity
    by_row = granularity.kind == "per_channel" and granularity.axis % weight.dim() == 0
    if not (by_row or granularity.kind == "per_tensor") or not _is_row_by_row(weight):
        return None
    if quantizer.batch_norm is not None and quantizer.channel_axis != 0:
        return None
    return quantizer.folded_grid(weight)


def _is_row_by_row(weight: Tensor) -> bool:
    """Tell whether a weight fills its memory, one output channel after the other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.is_contiguous() or (
        weight.dim() in formats and weight.is_contiguous(memory_format=formats[weight.dim()])
    )


def _in_order_of(weight: Tensor, value: Tensor) -> Tensor:
    if all(n == 1 or a == b for n, a, b in zip(weight.shape, value.stride(), weight.stride(), strict=True)):
        return value
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _in_parts(
    quantizer: WeightFakeQuantize,
    weight: Tensor,
    state: OscillationState,
    rule: OscillationRule,
    own_grid: bool,
    by_value: bool,
) -> None:
    if by_value:
        weight.copy_(torch.where(state.frozen, state.held.to(weight.dtype), weight))
    steps, step, zero_point = quantizer.steps(weight)
    # what transforms a weight knows it as a whole
    rows = weight.shape[0] if quantizer.method.transforms else _rows_in_cache(weight)
    parts = [torch.split(value, rows) for value in (*state, weight, steps, step, zero_point)]
    for part in zip(*parts, strict=True):
        _rows(quantizer, rule, own_grid, by_value, OscillationState(*part[:6]), *part[6:])


def _rows_in_cache(weight: Tensor) -> int:
    """Return how many rows of a weight are worked on at a time: on a CPU so few that all passes stay in its cache."""
    return max(1, _IN_CACHE * weight.shape[0] // weight.numel()) if weight.device.type == "cpu" else weight.shape[0]


def _rows(
    quantizer: WeightFakeQuantize,
    rule: OscillationRule,
    own_grid: bool,
    by_value: bool,
    state: OscillationState,
    weight: Tensor,
    steps: Tensor,
    step: Tensor,
    zero_point: Tensor,
) -> None:
    codes = steps.round_().add_(zero_point).clamp_(quantizer.qmin, quantizer.qmax)
    # as float32 at once: operations on two types take several times as long
    direction, held = state.direction.to(codes.dtype), state.held
    if not by_value:
        codes = torch.where(state.frozen, held, codes)
    change = torch.sign(codes - state.codes.to(codes.dtype))
    oscillates = change * direction < 0
    # not lerp, whose contracted product rounds otherwise from one processor to another
    state.frequency.add_((oscillates.to(torch.float32) - state.frequency).mul_(rule.momentum))
    state.average.add_((codes - state.average).mul_(rule.momentum))
    direction = torch.where(change != 0, change, direction)
    state.direction.copy_(direction)
    state.codes.copy_(codes)
    if rule.threshold is None:
        return
    restless = (state.frequency > rule.threshold) & ~state.frozen
    if own_grid:
        restless &= (codes > quantizer.qmin) & (codes < quantizer.qmax)
    # the average lags behind a weight that has come far: it decides between the two codes of the oscillation
    before = codes - direction
    settled = torch.round(state.average).clamp(torch.minimum(codes, before), torch.maximum(codes, before))
    frozen = state.frozen
    frozen |= restless
    held = torch.where(restless, (settled - zero_point) * step if by_value else settled, held)
    state.held.copy_(held)
    state.codes.copy_(torch.where(restless if by_value else frozen, settled if by_value else held, codes))
    values = held if by_value else quantizer.method.untransform((held - zero_point) * step, weight)
    weight.copy_(torch.where(frozen, values.to(weight.dtype), weight))
