"""Oscillations of quantized weights: tracking, dampening and iterative freezing.

A weight whose best value lies between two codes is pushed back and forth over their border by the straight-through
gradient. At few bits that corrupts batch norm statistics and keeps the network from settling.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, StateError
from qat.graph.prepared import PreparedModel
from qat.native import OscillationState
from qat.quantizers import WeightFakeQuantize
from qat.train.hooks import Hook
from qat.train.oscillation_settings import OscillationSettings
from qat.train.oscillation_step import OscillationRule, first_state, start, take_in

#: a weight oscillates where its frequency is above this (the paper's bound)
OSCILLATING = 0.005
#: by default, weights of fewer bits are tracked
_BITS = 8


class OscillationTracker(Hook):
    """Follows the codes of weights through training, and lets those that oscillate settle.

    After each step, with c the codes of a weight: it *oscillates* where c changes, against the direction of its change
    before. The frequency is `f = m o + (1 - m) f`, o being 1 where it does so in this step; the average of the codes is
    `a = m c + (1 - m) a`.

    *Freezing* (algorithm 1): a weight whose frequency is above the threshold keeps from then on that of the two codes
    between which it oscillates that is nearer to a. (The authors take round(a). In a short training the average still
    remembers where a weight came from, and that code would throw it back.) The float weight is set to the code's value
    after every step, on the grid as it is then, so the code stays whatever the optimizer, its momentum, the scale and
    the batch norm do. Where the scale follows the weight itself, weights at the ends of the grid are never frozen,
    since they make the grid. Where a batch norm follows whose statistics the grid does not (one scale for a whole
    weight, or one that stands still), the weight keeps the value that the code has when it is frozen: a code on the
    folded grid would make the weight grow with the statistics, and these with the weight.

    *Dampening*: `loss` is `dampen` times the sum of squared differences between weights and the values of
    their codes, without those that are clipped. Its gradient goes to the weights only.

    Nothing here waits for a device but `metrics`, `rates` and `state_dict`. In a loop of one's own:

        tracker = qat.OscillationTracker(qmodel, freeze=0.02)
        ...
            loss = loss_function(qmodel(x), y)
            dampening = tracker.loss(qmodel)  # None without `dampen`
            ...
            optimizer.step()
            tracker.step_end(qmodel)

    Args:
        model: The prepared model.
        weights: `state_dict` keys of the weights, as in `model.weight_quantizers()`; None for all below 8 bits.
        total_steps: Number of steps of the training, for what is scheduled.
        momentum: See `OscillationSettings`; so are the following.
        dampen: Likewise.
        dampen_schedule: Likewise.
        freeze: Likewise.
        freeze_final: Likewise.

    Raises:
        StateError: A weight is unknown, or there is none; a setting is out of range; or something is scheduled and
            `total_steps` is not given.
    """

    name = "oscillation"

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Iterable[str] | None = None,
        total_steps: int | None = None,
        momentum: float = 0.01,
        dampen: float = 0.0,
        dampen_schedule: Literal["constant", "cosine"] = "constant",
        freeze: float | None = None,
        freeze_final: float | None = None,
    ) -> None:
        self.settings = OscillationSettings(True, momentum, dampen, dampen_schedule, freeze, freeze_final)
        if self.settings.is_scheduled and total_steps is None:
            raise StateError("the schedule of an oscillation tracker has no length", "give total_steps")
        if total_steps is not None and total_steps < 1:
            raise StateError(f"total_steps is {total_steps}", "give the number of steps of the training")
        self.total_steps = total_steps
        self.weights = _chosen(prepared_model(model), weights)
        #: number of steps that were seen
        self.step = 0
        self._state: dict[str, OscillationState] = {}

    @classmethod
    def for_model(
        cls, model: nn.Module, settings: OscillationSettings | None = None, *, total_steps: int | None = None
    ) -> OscillationTracker | None:
        """Make the tracker that settings ask for; None where they ask for none.

        Args:
            model: The prepared model; any other has no quantized weights.
            settings: The settings; None for the defaults.
            total_steps: As for the class.

        Raises:
            StateError: As for the class.
        """
        settings = settings or OscillationSettings()
        if settings.enabled is False:
            return None
        if settings.enabled == "auto" and not (is_prepared(model) and _below_8_bits(prepared_model(model))):
            return None
        return cls(
            model, total_steps=total_steps, momentum=settings.momentum, dampen=settings.dampen,
            dampen_schedule=settings.dampen_schedule, freeze=settings.freeze, freeze_final=settings.freeze_final,
        )  # fmt: skip

    # -- schedules

    @property
    def threshold(self) -> float | None:
        """Frequency above which a weight is frozen in the next step; None for none."""
        start, end = self.settings.freeze, self.settings.freeze_final
        return start if start is None or end is None else end + (start - end) * (1.0 - self._progress())

    @property
    def dampening(self) -> float:
        """Weight of the dampening loss in the next step."""
        scheduled = self.settings.dampen_schedule == "cosine"
        return self.settings.dampen * (self._progress() if scheduled else 1.0)

    def _progress(self) -> float:
        """Return how far the training is, 0 to 1, by half a cosine."""
        share = min(1.0, self.step / max(1, (self.total_steps or 1) - 1))
        return 0.5 * (1.0 - math.cos(math.pi * share))

    # -- taking part in training

    def loss(self, model: nn.Module) -> Tensor | None:
        """Return the dampening loss, a scalar; None where there is none in this step."""
        factor = self.dampening
        if factor == 0.0:
            return None
        terms = [_distance(quantizer, weight) for _, quantizer, weight in self._quantized(model)]
        return factor * torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def step_end(self, model: nn.Module) -> None:
        """Take in the codes after a step, and freeze weights; nothing where they are not fake-quantized."""
        rule = OscillationRule(self.settings.momentum, self.threshold)
        for key, quantizer, weight in self._quantized(model):
            state = self._state.get(key)
            self._state[key] = start(quantizer, weight) if state is None else take_in(quantizer, weight, state, rule)
        self.step += 1

    def _quantized(self, model: nn.Module) -> list[tuple[str, WeightFakeQuantize, Tensor]]:
        return [
            (key, quantizer, weight)
            for key, quantizer, weight in prepared_model(model).weight_quantizers()
            if key in self.weights and quantizer.quantizing
        ]

    # -- what was seen

    def rates(self) -> dict[str, float]:
        """Return the share of each weight's elements that oscillate (a frequency above 0.005), by key."""
        return {key: _share(state.frequency > OSCILLATING) for key, state in self._state.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return the shares of tracked elements that oscillate, and that are frozen; empty before the first step."""
        if not self._state:
            return {}
        states = self._state.values()
        shares = {"oscillating": torch.cat([(s.frequency > OSCILLATING).flatten() for s in states])}
        if self.settings.freeze is not None:
            shares["frozen"] = torch.cat([s.frozen.flatten() for s in states])
        return {name: _share(flags) for name, flags in shares.items()}

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the counter of steps, and the codes, averages and frozen elements of every weight."""
        tensors = {"step": torch.tensor(self.step, dtype=torch.int64)}
        for key, state in self._state.items():
            tensors |= {f"{key}.{name}": value.detach().clone() for name, value in state._asdict().items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned; nothing is taken where something is wrong.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape or dtype; it is named.
        """
        left = dict(tensors)
        found: dict[str, OscillationState] = {}
        step = _taken(left, "step", torch.Size(), torch.int64)
        for key, shape in self.weights.items():
            if f"{key}.codes" not in left:
                continue
            like = first_state(torch.zeros(shape))._asdict()
            found[key] = OscillationState(
                *(_taken(left, f"{key}.{name}", shape, value.dtype) for name, value in like.items())
            )
        if left:
            raise CheckpointError(
                f"the oscillation state has the unknown entry {next(iter(left))!r}", "give the state of this model"
            )
        self.step = int(step)
        self._state = {key: OscillationState(*(t.clone() for t in state)) for key, state in found.items()}


def _distance(quantizer: WeightFakeQuantize, weight: Tensor) -> Tensor:
    """Return the squared distance of a weight from the values of its codes."""
    steps, step, zero_point = quantizer.steps(weight)
    inside = (steps + zero_point >= quantizer.qmin) & (steps + zero_point <= quantizer.qmax)
    away = quantizer.method.transform(weight) - torch.round(steps) * step
    return torch.where(inside, away, 0.0).square().sum()


def _share(flags: Tensor) -> float:
    return float(flags.to(torch.float32).mean())


def _taken(left: dict[str, Tensor], key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    value = left.pop(key, None)
    if value is None:
        raise CheckpointError(f"the oscillation state lacks {key!r}", "give the state of this model")
    if value.shape != shape or value.dtype != dtype:
        raise CheckpointError(
            f"{key!r} of the oscillation state is {value.dtype} of shape {tuple(value.shape)} and not {dtype} of "
            f"{tuple(shape)}",
            "give the state of this model",
        )
    return value


def is_prepared(model: nn.Module) -> bool:
    """Tell whether a model is a prepared one, also from within DistributedDataParallel and `torch.compile`."""
    return isinstance(_unwrapped(model), PreparedModel)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module within DistributedDataParallel and `torch.compile`."""
    while not isinstance(model, PreparedModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    return model


def prepared_model(model: nn.Module) -> PreparedModel:
    """Return the prepared model, also from within DistributedDataParallel and `torch.compile`.

    Raises:
        StateError: It is none.
    """
    inner = _unwrapped(model)
    if not isinstance(inner, PreparedModel):
        raise StateError(
            f"a {type(model).__name__} has no quantized weights", "give the model that qat.prepare returned"
        )
    return inner


def _below_8_bits(model: PreparedModel) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}
    seen: set[int] = set()
    for key, quantizer, weight in model.weight_quantizers():
        if quantizer.scheme.int_type.bits < _BITS and id(weight) not in seen:
            found[key] = weight.shape
        seen.add(id(weight))
    return found


def _chosen(model: PreparedModel, weights: Iterable[str] | None) -> dict[str, torch.Size]:
    """Return the shapes of the weights to track, by key."""
    if weights is None:
        chosen = _below_8_bits(model)
        if not chosen:
            raise StateError("no weight of the model is below 8 bits", "name the weights to be tracked")
        return chosen
    all_of_them = {key: weight.shape for key, _, weight in model.weight_quantizers()}
    names = list(weights)
    for name in names:
        if name not in all_of_them:
            near = difflib.get_close_matches(name, all_of_them, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(all_of_them)}"
            raise StateError(f"the model has no quantized weight {name!r}", mend)
    if not names:
        raise StateError("no weight is to be tracked", "name some, or give None for all below 8 bits")
    return {name: all_of_them[name] for name in names}
