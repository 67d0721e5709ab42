"""The fake quantizer of an activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from qat import native, numerics
from qat.encoding import Encoding
from qat.errors import DataError, SchemeError, StateError
from qat.observers import make_observer
from qat.quantizers.base import Phase, Quantizer
from qat.quantizers.dropping import draw_seed, keep_some
from qat.quantizers.extrema import tensor_range
from qat.quantizers.processes import is_distributed
from qat.quantizers.static import fake_quantize, is_for_native
from qat.scheme import QuantizerSpec, Scheme

if TYPE_CHECKING:
    from typing_extensions import Self


class FakeQuantize(Quantizer):
    """Observes, tracks and fake-quantizes one activation.

    By phase, in this order: *observing* feeds the observer; *tracking*, in training mode, moves the range
    towards the batch's smallest and largest value (`new = old + momentum * (batch - old)`; the first batch
    sets a range that was never calibrated) and recomputes the grid; *quantizing* fake-quantizes with the
    grid. A batch with nan or inf does not enter the moving average, and an empty one does nothing. Under
    `torch.distributed` the range of a batch is that of all processes, by one small message, so the moving
    average equals that of one process on the same data; every process must then run the forward pass in
    training mode.

    With a learned quantizer, *tracking* means that the parameters make the grid, in training and evaluation. With the
    option `drop` (Wei et al., "QDrop", ICLR 2022), in training mode each element of the result is the float value with
    that probability; each forward pass draws a seed from torch's global generator, that of the CPU (see
    `qat.quantizers.dropping`).

    Besides the buffers of `Quantizer` there are `samples`, the calibrated samples, and `tracked`, the samples
    of the moving average, both int64 scalars.

    Args:
        scheme: Per-tensor or per-channel.
        name: Name of the tensor, for messages.
        channels: Number of channels along the axis of a per-channel scheme.
        fixed: Range `(low, high)` that the tensor has by its nature, such as (0, 1) after a softmax: it is
            never observed, tracked or learned.
        momentum: Weight of a batch in the moving average.
        tied: It serves several places.

    Raises:
        SchemeError: A per-group scheme, a per-channel one without `channels`, a momentum outside (0, 1], or
            what `Quantizer` refuses.
        EncodingError: The fixed range is inverted or not finite.
    """

    samples: Tensor
    tracked: Tensor
    step_min: Tensor
    step_max: Tensor

    def __init__(
        self,
        scheme: Scheme,
        name: str,
        channels: int | None = None,
        *,
        fixed: tuple[float, float] | None = None,
        momentum: float = 0.01,
        tied: bool = False,
    ) -> None:
        kind = scheme.granularity.kind
        if kind == "per_group":
            raise SchemeError(f"activation {name!r} cannot be quantized per group", "choose per_tensor or per_channel")
        if kind == "per_channel" and channels is None:
            raise SchemeError(f"activation {name!r} has no known number of channels", "choose per_tensor")
        if not 0.0 < momentum <= 1.0:
            raise SchemeError(f"momentum {momentum} for {name!r} is outside (0, 1]", "choose a small positive one")
        count = channels if kind == "per_channel" and channels is not None else 1
        if fixed is not None:
            drop = {key: value for key, value in scheme.quantizer.options.items() if key == "drop"}
            scheme = scheme.with_(quantizer=QuantizerSpec("static", drop))
        super().__init__(scheme, name, count, "activation")
        self.momentum = momentum
        self.fixed = fixed
        self.tied = tied
        if tied:
            # the range of the places passed so far in this forward pass
            self.register_buffer("step_min", torch.full(self.scale.shape, torch.inf), persistent=False)
            self.register_buffer("step_max", torch.full(self.scale.shape, -torch.inf), persistent=False)
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tracked", torch.zeros((), dtype=torch.int64))
        if fixed is None:
            self.observer = make_observer(
                scheme.observer, scheme.granularity, None if kind == "per_tensor" else count, name
            )
        else:
            low, high = (torch.full(self.scale.shape, v, dtype=torch.float64) for v in fixed)
            self._set_range(low, high, "fixed", f"range [{fixed[0]:g}, {fixed[1]:g}]")

    def forward(self, x: Tensor, constant: bool = False, last: bool = True) -> Tensor:
        """Return `x`, fake-quantized where the phase says so, in its shape and dtype.

        Args:
            x: The activation.
            constant: It is a constant operand: its range is not taken.
            last: Of a tied quantizer, this is the last place in the forward pass.

        Raises:
            DataError: `x` is not floating point.
            StateError: Fake quantization without a range; the tensor is named.
        """
        if self.fixed is None:
            if self.observing and not constant:
                statistics = self.observer.statistics() if self._observes_natively(x) else None
                if statistics is not None:
                    return self._dropped(x, self._observe_and_quantize(x, statistics), constant)
                self.observer.observe(x.detach())
            if self.tracks and (last or not constant):
                if self._tracks_natively(x):
                    state = (self.min_val, self.max_val, self.scale, self.zero_point, self.tracked)
                    return self._dropped(x, native.fake_quantize_track(x, state, self.momentum, self.rule), constant)
                self._track(x.detach(), constant, last)
        if not self.quantizing:
            return self._anchored(x)
        if not self.ready and not self.tracks:
            raise self._no_range()
        if not x.is_floating_point():
            raise DataError(f"{self.name!r} is a tensor of {x.dtype}", "quantize only floating-point tensors")
        if self.learning:
            y = self.method.fake_quantize(x, self.learned_parameters(), self.start)
        else:
            y = fake_quantize(x, self.scale, self.zero_point, self.rule.qmin, self.rule.qmax, self.scheme.granularity)
        return self._anchored(self._dropped(x, y, constant))

    def _dropped(self, x: Tensor, y: Tensor, constant: bool) -> Tensor:
        """Return the fake-quantized `y`, some elements of which keep their float value."""
        if constant or not self.drops:
            return y
        return keep_some(x, y, self.method.drop, draw_seed())

    @property
    def tracks(self) -> bool:
        """Whether the next batch moves the range."""
        return self.tracking and self.training and self.fixed is None and self.method.follows

    @property
    def drops(self) -> bool:
        """Whether some elements keep their float value."""
        return self.training and self.method.drop > 0.0

    @property
    def is_plain(self) -> bool:
        """Whether what is quantized is so on the grid of the buffers, and nothing but `drops` is done to it."""
        return not self.learning and not self.is_anchored

    @property
    def is_plainly_learned(self) -> bool:
        """Whether what is quantized is so on the grid of `learned_grid`, and nothing but `drops` is done to it."""
        return self.learning and self.method.learns_grid and not self.is_anchored

    def learned_grid(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return scale and zero point as `fake_quantize_learned` takes them, and the factor of their gradients.

        Args:
            x: A tensor of the shape of the activation.
        """
        scale, zero_point = self.parameter_grid()
        return scale, zero_point, self.method.gradient_factor(x, scale.numel())

    def _tracks_natively(self, x: Tensor) -> bool:
        """Tell whether one native operator takes the range, moves the grid and fake-quantizes."""
        return self._has_native_pass(x) and not self.tied and not is_distributed()

    def _observes_natively(self, x: Tensor) -> bool:
        """Tell whether one native operator fake-quantizes on the grid as it is, and fills an observer's buffers."""
        return self._has_native_pass(x) and self.ready and not self.tracks

    def _has_native_pass(self, x: Tensor) -> bool:
        """Tell whether native operators that also look at `x` can fake-quantize it; what is wrong is left to others."""
        return (
            self.quantizing
            and self.is_plain
            and x.numel() > 0
            and is_for_native(x, self.scheme.granularity)
            and self.scale.numel() == (1 if self.rule.axis is None else x.shape[self.rule.axis])
            and self.scale.device == x.device
        )

    def _observe_and_quantize(self, x: Tensor, statistics: native.Statistics) -> Tensor:
        qmin, qmax, axis, *_ = self.rule
        y = native.fake_quantize_observe(x, self.scale, self.zero_point, qmin, qmax, axis, statistics)
        self.observer.count_samples(x)
        return y

    @torch.no_grad()
    def _track(self, x: Tensor, constant: bool, last: bool) -> None:
        if x.numel() > 0 and not (constant and self.tied):
            low, high = tensor_range(x, self.scheme.granularity)
        else:
            low, high = torch.full_like(self.min_val, torch.inf), torch.full_like(self.max_val, -torch.inf)
        if self.tied:
            low, high = torch.minimum(self.step_min, low), torch.maximum(self.step_max, high)
            self.step_min.copy_(torch.full_like(low, torch.inf) if last else low)
            self.step_max.copy_(torch.full_like(high, -torch.inf) if last else high)
            if not last:
                return
        low, high, samples = _of_all_processes(low, high, x.shape[0] if x.dim() > 0 else 1)
        unknown = self.min_val > self.max_val
        usable = torch.isfinite(low) & torch.isfinite(high)
        for buffer, batch in ((self.min_val, low), (self.max_val, high)):
            moved = torch.where(unknown, batch, buffer + self.momentum * (batch - buffer))
            buffer.copy_(torch.where(usable, moved, buffer))
        known = self.min_val <= self.max_val
        scale, zero_point = numerics.range_to_scale_unchecked(
            torch.where(known, self.min_val, 0.0), torch.where(known, self.max_val, 0.0), self.scheme
        )
        self.scale.copy_(torch.where(known, scale, self.scale))
        self.zero_point.copy_(torch.where(known, zero_point, self.zero_point))
        self.tracked.add_(samples)

    def set_phase(self, phase: Phase) -> None:
        """Enter a phase."""
        super().set_phase(phase)
        self._settle()

    def train(self, mode: bool = True) -> Self:
        """Enter training or evaluation mode."""
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        """Take note of a range that only training has set; the forward pass never waits for a device."""
        if not self.ready and int(self.tracked) and self._has_tracked_range():
            self._note("qat", "moving_average", has_range=True)

    def _has_tracked_range(self) -> bool:
        return bool((self.min_val <= self.max_val).all())

    def finish(self) -> None:
        """Set the grid from what was observed (the end of calibration); nothing to do for a fixed range.

        Raises:
            StateError: Nothing was observed; the tensor is named.
            DataError: nan or inf was observed; the tensor is named.
        """
        if self.fixed is not None:
            return
        if self.observer.is_empty:
            raise StateError(f"no data reached {self.name!r}", "calibrate with at least one batch")
        self.observer.finite_or_raise(self.name)
        low, high = self.observer.range(self.scheme)
        self._set_range(low, high, "ptq", self.scheme.observer.name)
        self.samples.copy_(self.observer.samples)
        self.tracked.zero_()

    def set_range(self, low: Tensor, high: Tensor, method: str) -> None:
        """Set the grid from a range that was chosen otherwise than by `finish`; the samples stay what they are.

        Args:
            low: Lower bound, () or (C,).
            high: Upper bound, likewise.
            method: What chose it.

        Raises:
            EncodingError: The range is inverted or not finite; the tensor is named.
        """
        self._set_range(low, high, "ptq", method)

    def encoding(self) -> Encoding:
        """Return the encoding: `qat` once tracked or learned in training, else as calibrated, fixed or loaded.

        Raises:
            StateError: There is no range yet; the tensor is named.
        """
        tracked = int(self.tracked)
        samples = int(self.samples) + tracked
        if self.learning:
            return self._learned_encoding(samples)
        if tracked and self._has_tracked_range():
            return self._buffers_encoding("qat", "moving_average", samples, has_range=True)
        if self._provenance is None:
            raise self._no_range()
        return self._buffers_encoding(self._provenance, self._method, samples, self._has_range)

    def load_encoding(self, encoding: Encoding) -> None:
        """Take the grid, range, provenance and sample count of an encoding.

        Raises:
            EncodingError: It does not fit the scheme, or the number of channels; the tensor is named.
        """
        super().load_encoding(encoding)
        self.samples.fill_(encoding.samples)
        self.tracked.zero_()


def _of_all_processes(low: Tensor, high: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return the widest range, and all samples, over the processes of the default group; infinite where any has nan."""
    if not is_distributed():
        return low, high, samples
    # a maximum need not carry nan over, but infinity it does, and both keep the batch out of the average
    both = torch.nan_to_num(torch.stack([-low, high]), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own = torch.cat([both.flatten().double(), both.new_full((1,), samples).double()])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    each = torch.stack(parts)
    both = each[:, :-1].amax(0).to(both.dtype).view(both.shape)
    return -both[0], both[1], each[:, -1].sum().to(torch.int64)
