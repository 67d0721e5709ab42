"""`Observer`: what every range statistic has in common (state in buffers, merging, reducing)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat import native
from qat.errors import DataError, SchemeError, StateError
from qat.observers.channels import channel_count, finite_extrema
from qat.observers.options import Option
from qat.scheme import Granularity, Scheme

Reduction = Literal["min", "max", "sum", "smallest", "largest"]


class Observer(nn.Module, ABC):
    """A streaming statistic of one tensor that chooses its range.

    The whole state is in buffers whose shapes are final from construction on, so it survives `state_dict`
    (with `weights_only=True`), `copy.deepcopy`, a move between devices and a resumed run. Float buffers stay
    float32 when the model is cast to another float type. Values are observed as float32; nan and inf never
    enter a statistic, they are counted, and `finite_or_raise` reports them.

    Args:
        granularity: Which elements share a range.
        channels: Number of channels (or, for per-group, of groups); None for per-tensor.
        name: Name of the tensor, for messages.
        options: The observer's options; `OPTIONS` says which are legal, and the registry checks them.

    Attributes:
        OPTIONS: Legal options by name.
        about: What the range is, in a line, for the table of methods.
        source: Where the method comes from, likewise.
        order_dependent: The result depends on how the data was divided into batches and on their order.
        minimises_error: The range is meant to have the least squared quantization error.
        looks_at_rows: Of a tensor that is at hand as a whole, the elements decide (`range_of_rows`), not counts.
        gives_scale: The method yields a scale. Its range is the one whose scale that is, for symmetric schemes, and
            may reach a little beyond what was observed.
        constant_is_exact: The range of a constant tensor is its value, whatever the method would say.
        min_val: Smallest value (what exactly, the subclass says), float32, shape () or (C,); inf before any.
        max_val: Largest value, likewise; -inf before any.
        samples: Batch rows (`x.shape[0]`) observed, int64, shape ().
        nonfinite: Elements observed that were nan or inf, int64, shape ().
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    about: ClassVar[str] = ""
    source: ClassVar[str] = "qat"
    order_dependent: ClassVar[bool] = False
    minimises_error: ClassVar[bool] = False
    looks_at_rows: ClassVar[bool] = False
    gives_scale: ClassVar[bool] = False
    constant_is_exact: ClassVar[bool] = True

    min_val: Tensor
    max_val: Tensor
    samples: Tensor
    nonfinite: Tensor

    def __init__(self, granularity: Granularity, channels: int | None, name: str, **options: Any) -> None:
        super().__init__()
        if (granularity.kind == "per_tensor") != (channels is None):
            raise SchemeError(
                f"observer of {name!r}: {channels} channels for granularity {granularity.kind}",
                "give the number of channels for per_channel and per_group, None for per_tensor",
            )
        self.granularity = granularity
        self.channels = channels
        self.name = name
        self.options: dict[str, Any] = {key: option.default for key, option in self.OPTIONS.items()} | options
        shape = () if channels is None else (channels,)
        self.register_buffer("min_val", torch.full(shape, math.inf, dtype=torch.float32))
        self.register_buffer("max_val", torch.full(shape, -math.inf, dtype=torch.float32))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))

    # --- to be given by each statistic

    @abstractmethod
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in a batch.

        Args:
            x: The batch, not empty, float32, float16 or bfloat16; may hold nan and inf, which must be left
                out.
            low: Its smallest finite values, float32, shape () or (C,); inf where a channel has none.
            high: Its largest finite values, likewise; -inf where a channel has none.
        """

    def statistics(self) -> native.Statistics | None:
        """Return the buffers that the native extension may change instead of `_update`; None where it may not.

        A pass that does more than to observe changes them without `observe`, and calls `count_samples`.
        """
        return None

    def _update_natively(self, x: Tensor) -> None:
        """Do the work of `_update`, and count into `nonfinite`, by the native extension."""
        statistics = self.statistics()
        if statistics is not None:
            native.observe(x, statistics, self._native_axis)
            return
        low, high, nonfinite = native.observe_minmax(x, self._native_axis)
        self._update(x, low, high)
        self.nonfinite += nonfinite

    @abstractmethod
    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range, float64, on the CPU, () or (C,); whatever for channels without values."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that contradict each other; each by itself is legal already.

        Args:
            options: The value of every option.

        Raises:
            SchemeError: There is a contradiction.
        """

    def range_of_rows(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range of a tensor that is at hand as a whole, by its elements; only where `looks_at_rows`.

        Args:
            rows: All that was observed, one row a channel, (R, K), finite.
            scheme: As for `range`.

        Returns:
            As `range`, (R,) each.
        """
        raise NotImplementedError(f"{type(self).__name__} chooses by what it has counted")

    def reductions(self) -> dict[str, Reduction]:
        """Declare how each buffer of several observers becomes that of one.

        `min`, `max` and `sum` go element by element. `smallest` and `largest` keep, along the last dimension, as many
        of both observers' elements as the buffer has room for, sorted from the smallest or the largest on.
        """
        return {"min_val": "min", "max_val": "max", "samples": "sum", "nonfinite": "sum"}

    def _initial(self) -> dict[str, float | int]:
        """Return what each buffer is filled with before any observation."""
        neutral = {"min": math.inf, "max": -math.inf, "sum": 0, "smallest": math.inf, "largest": -math.inf}
        return {key: neutral[kind] for key, kind in self.reductions().items()}

    # --- observing

    def forward(self, x: Tensor) -> Tensor:
        """Observe `x` and return it."""
        self.observe(x)
        return x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in one batch; an empty one changes nothing. No device synchronisation.

        Args:
            x: Any shape that has the granularity's axis, any real dtype; observed as float32, so a float64
                value beyond float32's range counts as infinite.

        Raises:
            DataError: `x` does not have the channels that the observer was made for.
        """
        self._check_shape(x)
        if x.numel() == 0:
            return
        x = x.detach()
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            x = x.to(torch.float32)
        if self._is_for_native(x):
            self._update_natively(x)
        else:
            low, high, nonfinite = finite_extrema(x, self.granularity)
            self._update(x, low.to(torch.float32), high.to(torch.float32))
            if nonfinite is not None:
                self.nonfinite += nonfinite
        self.count_samples(x)

    def count_samples(self, x: Tensor) -> None:
        """Note what there is to know of a batch besides its elements, which are in the buffers already: its rows."""
        self.samples += x.shape[0] if x.dim() else 1

    def _is_for_native(self, x: Tensor) -> bool:
        return (
            x.dtype != torch.float16
            and self.granularity.kind != "per_group"
            and self.min_val.device == x.device
            and not torch.compiler.is_compiling()
            and native.status().runs_on(x.device)
        )

    @property
    def _native_axis(self) -> int | None:
        return None if self.channels is None else self.granularity.axis

    def _check_shape(self, x: Tensor) -> None:
        if self.channels is None:
            return
        axis = self.granularity.axis
        if not -x.dim() <= axis < x.dim():
            raise DataError(
                f"tensor {self.name!r} has shape {tuple(x.shape)} and no axis {axis}",
                "choose an axis that exists",
            )
        found = channel_count(x.shape, self.granularity)
        if found != self.channels:
            raise DataError(
                f"tensor {self.name!r} of shape {tuple(x.shape)} has {found} channels or groups along axis "
                f"{axis}, its observer was made for {self.channels}",
                "give data of the shape that the model was prepared with",
            )

    # --- results

    @property
    def is_empty(self) -> bool:
        """Whether no element was observed, not even one that is not finite. Reads the device."""
        return int(self.samples) == 0

    def finite_or_raise(self, name: str | None = None) -> None:
        """Raise if a nan or inf was observed. Reads the device.

        Args:
            name: Name for the message; the observer's own by default.

        Raises:
            DataError: At least one observed element was nan or inf.
        """
        count = int(self.nonfinite)
        if count:
            raise DataError(
                f"tensor {name or self.name!r}: {count} of the observed values are nan or inf",
                "check the data and the weights that lead there",
            )

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Choose the range. Reads the device.

        Args:
            scheme: The scheme that will quantize; observers that minimise an error use its formula.

        Returns:
            Lower and upper bounds, float64, shape () or (C,), finite, low <= high, within what was observed (unless
            the method yields a scale, `gives_scale`), on the observer's device. A channel of which no finite value was
            observed gets (0, 0), a constant one its value (but for `constant_is_exact`).

        Raises:
            StateError: Nothing was observed.
            DataError: Nothing finite was observed.
        """
        if self.is_empty:
            raise StateError(f"tensor {self.name!r}: no value was observed", "calibrate with at least one batch")
        seen = (self.min_val <= self.max_val).cpu()
        if not bool(seen.any()):
            self.finite_or_raise()
        low, high = self._range(scheme)
        zero = torch.zeros_like(low)
        least, most = self.min_val.cpu().to(torch.float64), self.max_val.cpu().to(torch.float64)
        low, high = low.clamp(min=-_LARGEST), high.clamp(max=_LARGEST)
        if self.constant_is_exact:
            low, high = (torch.where(least == most, least, bound) for bound in (low, high))
        # the sum turns -0.0, whose survival depends on the order of batches, into 0.0
        low, high = torch.where(seen, low, zero) + 0.0, torch.where(seen, high, zero) + 0.0
        return low.to(self.min_val.device), high.to(self.min_val.device)

    # --- merging

    def merge(self, other: Observer) -> None:
        """Take in all that `other` observed; `other` is unchanged.

        Raises:
            StateError: `other` is of another kind, granularity or number of channels, or has other options.
        """
        mine = (type(self), self.granularity, self.channels, self.options)
        if mine != (type(other), other.granularity, other.channels, other.options):
            raise StateError(
                f"the observers of {self.name!r} and {other.name!r} differ in kind, granularity or options",
                "merge observers that were made alike",
            )
        with torch.no_grad():
            for key, kind in self.reductions().items():
                target = self.get_buffer(key)
                target.copy_(_COMBINE[kind](target, other.get_buffer(key).to(target.device)))

    def all_reduce(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Merge the observers of all processes in place, by `reductions`; every process must call it.

        Afterwards each process holds the whole, so it is called once, after the last batch: observing on and
        calling it again would count the first part once per process. To look at the whole and go on, reduce a
        `copy.deepcopy`. Does nothing where torch.distributed is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        operators = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}
        with torch.no_grad():
            for key, kind in self.reductions().items():
                buffer = self.get_buffer(key)
                if kind in operators:
                    dist.all_reduce(buffer, op=operators[kind], group=process_group)
                    continue
                parts = [torch.empty_like(buffer) for _ in range(dist.get_world_size(process_group))]
                dist.all_gather(parts, buffer.contiguous(), group=process_group)
                for index, part in enumerate(parts):
                    buffer.copy_(part if index == 0 else _COMBINE[kind](buffer, part))

    def reset(self) -> None:
        """Forget everything observed."""
        with torch.no_grad():
            for key, value in self._initial().items():
                self.get_buffer(key).fill_(value)

    def extra_repr(self) -> str:
        """Name, granularity and options, for printing a model."""
        words = [repr(self.name), self.granularity.kind]
        words += [] if self.channels is None else [f"channels={self.channels}"]
        words += [f"{key}={value}" for key, value in self.options.items()]
        return ", ".join(words)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Observer:
        """Move with the model, but keep float32: in float16 an observed 70000 would become inf."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[key] = old.to(new.device)
        return self


#: the largest float32: whatever a method asks for, its range stays one of floats
_LARGEST = torch.finfo(torch.float32).max


def smallest_of(mine: Tensor, other: Tensor) -> Tensor:
    """Return the smallest elements of both along the last dimension, ascending, as many as `mine` has."""
    return torch.cat([mine, other], dim=-1).sort(dim=-1).values[..., : mine.shape[-1]]


def largest_of(mine: Tensor, other: Tensor) -> Tensor:
    """Return the largest elements of both along the last dimension, descending, as many as `mine` has."""
    return torch.cat([mine, other], dim=-1).sort(dim=-1, descending=True).values[..., : mine.shape[-1]]


_COMBINE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "sum": torch.add,
    "smallest": smallest_of,
    "largest": largest_of,
}
