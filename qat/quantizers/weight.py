"""The fake quantizer of a weight, as a parametrization, with batch-norm scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat import native, numerics
from qat.encoding import Encoding
from qat.errors import DataError, EncodingError, SchemeError, StateError
from qat.observers import weight_range
from qat.quantizers.base import Quantizer
from qat.quantizers.extrema import rows_of, tensor_range
from qat.quantizers.folding import GAMMA_FLOOR, folding_factor, spread
from qat.quantizers.learned import fake_quantize_learned
from qat.quantizers.method import Start
from qat.quantizers.rounding import LearnedRounding
from qat.quantizers.static import fake_quantize, is_for_native
from qat.scheme import Scheme


class WeightFakeQuantize(Quantizer):
    """Fake-quantizes a weight, as a parametrization of its module (`torch.nn.utils.parametrize`).

    *The grid.* With the `minmax` observer the scale follows the weight: it is recomputed in every forward
    pass, and the buffers only hold that of the last `refresh`. With any other observer, and after
    `load_encoding` or `set_codes`, the grid is that of the buffers until the next `refresh`. A learned quantizer's
    grid is that of its parameters while *tracking*, else that of the buffers. `observing` means nothing to a weight.

    *The weight.* A quantizer may transform it first (`dorefa`); what is said of the weight below is then said of the
    transformed one.

    *Batch norm.* With `bn`, the weight that is quantized is `w * f`, `f = gamma / sqrt(running_var + eps)`
    for every output channel, and the module gets `fake_quantize(w * f) / f`: its output, normalized with the
    running statistics, is the output of the folded integer layer. `f` is a constant to the gradient: gamma
    gets its gradient through the batch norm itself, and through `f` there would be only that of the rounding
    error. A gamma below `GAMMA_FLOOR` in magnitude is used as that, with its sign. The batch norm is referred
    to, not owned: it is no submodule, adds no key to the state, and `copy.deepcopy` of a model refers to the
    copied one.

    *Learned scales* of output channels (`lsq`) are those of `w` itself: the grid of `w * f` is theirs times `|f|`, the
    one that folding gives. Otherwise every step's change of the running variance would move weights over the borders of
    their codes; and codes that are frozen would let the statistics run away, since `w` then is what `f` makes of them.

    The gradient of the weight is the range mask of `fake_quantize`.

    Args:
        scheme: Of the weight; a per-channel axis is that of its output channels.
        name: `state_dict` key of the weight, for messages.
        shape: Of the weight.
        bn: The batch norm that follows; None for none.
        channel_axis: Axis of the output channels: 0, or 1 for transposed convolutions.
        groups: Groups of a transposed convolution, whose output channels are groups x the axis.

    Raises:
        SchemeError: The scheme does not fit the shape, the batch norm keeps no running statistics or has
            another number of channels; the weight is named.
    """

    def __init__(
        self,
        scheme: Scheme,
        name: str,
        shape: Sequence[int],
        bn: nn.Module | None = None,
        *,
        channel_axis: int = 0,
        groups: int = 1,
    ) -> None:
        self._check(scheme, name, shape, bn, channel_axis, groups)
        super().__init__(scheme, name, _scale_count(scheme, shape), "weight")
        self.shape = tuple(shape)
        self.channel_axis = channel_axis
        self.groups = groups
        # in a tuple, so that it does not become a submodule
        self._bn: tuple[_BatchNorm, ...] = (bn,) if isinstance(bn, _BatchNorm) else ()
        self._rounding: tuple[LearnedRounding, ...] = ()

    @staticmethod
    def _check(
        scheme: Scheme, name: str, shape: Sequence[int], bn: nn.Module | None, channel_axis: int, groups: int
    ) -> None:
        axis = scheme.granularity.axis
        if scheme.granularity.kind != "per_tensor" and not -len(shape) <= axis < len(shape):
            raise SchemeError(f"{name!r} of shape {tuple(shape)} has no axis {axis}", "choose an axis that it has")
        if math.prod(shape) == 0:
            raise SchemeError(f"{name!r} of shape {tuple(shape)} is empty", "leave it float")
        if not 0 <= channel_axis < len(shape):
            raise SchemeError(f"{name!r} of shape {tuple(shape)} has no channel axis {channel_axis}", "choose 0 or 1")
        if groups != 1 and (channel_axis != 1 or groups < 1 or shape[0] % groups):
            raise SchemeError(
                f"{groups} groups do not fit {name!r} of shape {tuple(shape)}",
                "give groups only for a transposed convolution, a divisor of its input channels",
            )
        if bn is None:
            return
        if not isinstance(bn, _BatchNorm):
            raise SchemeError(f"{name!r} cannot be scaled by a {type(bn).__name__}", "give a batch norm")
        if bn.running_var is None:
            raise SchemeError(
                f"the batch norm after {name!r} keeps no running statistics", "set track_running_stats=True"
            )
        if bn.num_features != shape[channel_axis] * groups:
            raise SchemeError(
                f"the batch norm after {name!r} has {bn.num_features} channels and the weight "
                f"{shape[channel_axis] * groups}",
                "give the batch norm of this layer",
            )

    @property
    def batch_norm(self) -> _BatchNorm | None:
        """The batch norm that scales this weight."""
        return self._bn[0] if self._bn else None

    @property
    def follows(self) -> bool:
        """Whether the scale is recomputed from the weight in every forward pass."""
        return self.scheme.observer.name == "minmax" and not self._loaded and not self.method.names

    def factor(self) -> Tensor | None:
        """Return `gamma / sqrt(running_var + eps)`, float32 (output channels,); None without a batch norm."""
        return folding_factor(self._bn[0]) if self._bn else None

    def _spread_factor(self, weight: Tensor) -> Tensor | None:
        """Return the factor so that it broadcasts against the weight."""
        factor = self.factor()
        return None if factor is None else spread(factor, weight, self.channel_axis, self.groups)

    @property
    def has_free_scales(self) -> bool:
        """Whether every output channel has a scale of its own, which may have any value."""
        granularity = self.scheme.granularity
        by_channel = granularity.kind == "per_channel" and granularity.axis % len(self.shape) == self.channel_axis
        return by_channel and self.groups == 1 and not self.scheme.power_of_two

    @property
    def follows_batch_norm(self) -> bool:
        """Whether the grid of the folded weight moves with the factor of the batch norm, so that no code does."""
        learned = self.method.homogeneous and self.has_free_scales
        return bool(self._bn) and (learned or self.follows)

    def _unit(self) -> Tensor | None:
        """Return what learned scales are multiplied with, in their shape; None where they are of the folded weight."""
        factor = self.factor() if self.method.homogeneous and self.follows_batch_norm else None
        return None if factor is None else factor.abs()

    @property
    def start(self) -> Start:
        """Where learning starts from, in the units of the parameters."""
        return self._start(self._unit())

    def _start(self, unit: Tensor | None) -> Start:
        held = self.held
        if unit is None:
            return held
        return Start(held.scale / unit, held.zero_point, held.low / unit, held.high / unit)

    def parameter_grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the folded weight that the parameters make, float32, with their gradients."""
        unit = self._unit()
        scale, zero_point = self.method.grid(self.learned_parameters(), self._start(unit))
        return scale if unit is None else scale * unit, zero_point

    def _grid(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for a folded weight, in a shape that fits the scheme."""
        if self.follows:
            low, high = tensor_range(folded, self.scheme.granularity)
            return numerics.range_to_scale_unchecked(low, high, self.scheme)
        return self.grid()

    def _no_range(self) -> StateError:
        return StateError(
            f"{self.name!r} has no range yet", "call refresh with the weight, or calibrate the model first"
        )

    def _folded(self, weight: Tensor) -> Tensor:
        """Return the weight that is quantized, float32, without gradient."""
        return _fold(self.method.transform(weight.detach()), self._spread_factor(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, fake-quantized in the phase *quantizing*, in its shape and dtype.

        Raises:
            StateError: Fake quantization with an observer whose range was never set; the weight is named.
        """
        if not self.quantizing:
            return self._anchored(weight)
        if self._rounding:
            return self._rounding[0].weight().to(weight.dtype)
        if self.learning:
            return self._on_learned_grid(weight)
        return self._anchored(self._on_kept_grid(self.method.transform(weight)).to(weight.dtype))

    def _on_kept_grid(self, weight: Tensor) -> Tensor:
        if self._is_for_native(weight):
            grid = None if self.follows else (self.scale, self.zero_point)
            return native.fake_quantize_weight(weight, self.rule, self.native_factor(), grid)
        factor = self._spread_factor(weight)
        scale, zero_point = self._grid(_fold(weight, factor))
        return fake_quantize(weight, scale, zero_point, self.qmin, self.qmax, self.scheme.granularity, factor=factor)

    def _on_learned_grid(self, weight: Tensor) -> Tensor:
        if not self.ready:
            raise self._no_range()
        factor = self._spread_factor(weight)
        if not self.method.learns_grid:
            folded = weight if factor is None else weight.to(torch.float32) * factor
            out = self.method.fake_quantize(folded, self.learned_parameters(), self.start)
            return out if factor is None else (out / factor).to(weight.dtype)
        scale, zero_point = self.parameter_grid()
        rate = self.method.gradient_factor(weight, scale.numel())
        qmin, qmax, axis, *_ = self.rule
        norm = self.native_factor() if self._is_for_native(weight) else None
        if norm is not None:
            return native.fake_quantize_weight_learned(weight, scale, zero_point, qmin, qmax, norm, axis, rate)
        folded = weight if factor is None else weight.to(torch.float32) * factor
        out = fake_quantize_learned(folded, scale, zero_point, qmin, qmax, self.scheme.granularity, rate)
        return out if factor is None else (out / factor).to(weight.dtype)

    def _is_for_native(self, weight: Tensor) -> bool:
        """Tell whether the native extension has this case; what is wrong is left to the other path."""
        # compiled code has nothing to fuse it with, and the loops that the compiler makes of it are slower
        if not is_for_native(weight, self.scheme.granularity, compiled=True) or not (self.follows or self.ready):
            return False
        tensors = [t for bn in self._bn for t in (bn.weight, bn.running_var) if t is not None]
        if not self.follows:
            tensors.append(self.scale)
        return all(t.dtype == torch.float32 and t.device == weight.device for t in tensors)

    def native_factor(self) -> native.BatchNormFactor | None:
        """Return what `factor` is made of, for native operators."""
        if not self._bn or self._bn[0].running_var is None:
            return None
        bn = self._bn[0]
        return native.BatchNormFactor(
            bn.weight, self._bn[0].running_var, bn.eps, GAMMA_FLOOR, self.channel_axis, self.groups
        )

    # -- rounding that an algorithm chooses

    @torch.no_grad()
    def folded_grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of `w * f`, in a shape that fits the scheme.

        Args:
            weight: The float weight, `module.parametrizations.weight.original`.

        Raises:
            StateError: An observer's range was never set; the weight is named.
        """
        return self._grid(self._folded(weight)) if self.follows else self.grid()

    @torch.no_grad()
    def steps(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a weight in steps of its grid, the size of a step, and the zero point, for algorithms that round.

        Args:
            weight: The float weight, `module.parametrizations.weight.original`.

        Returns:
            `w * f / scale`, `scale / f` and the zero point, float32, each in the shape of the weight.

        Raises:
            StateError: An observer's range was never set; the weight is named.
        """
        factor = self._spread_factor(weight)
        folded = self._folded(weight)
        scale, zero_point = (numerics.expand_to(v, folded, self.scheme.granularity) for v in self._grid(folded))
        step = scale if factor is None else scale / factor
        zero_point = zero_point.to(torch.float32)
        return folded / scale, step.expand_as(folded), zero_point.expand_as(folded)

    def learn_rounding(self, rounding: LearnedRounding | None) -> None:
        """Let `forward` return the soft weight of `rounding` in the phase *quantizing*; None for its own again.

        The rounding is referred to, not owned: it is no submodule and no part of the state.
        """
        self._rounding = () if rounding is None else (rounding,)

    @torch.no_grad()
    def set_codes(self, weight: Tensor, codes: Tensor, method: str, *, scale: Tensor | None = None) -> None:
        """Give the float weight the values of these codes, and keep the grid as it is from now on.

        Args:
            weight: The float weight, `module.parametrizations.weight.original`, which is written.
            codes: Integers in its shape, in the range of the scheme: what `codes(weight)` returns afterwards.
            method: What chose them, for the provenance.
            scale: Of the new grid, float32, in the shape of the buffer; None for the scale that it has.

        Raises:
            EncodingError: Another shape, codes out of range, a scale that is not one, or codes that the dtype of the
                weight cannot hold; then nothing has changed.
        """
        if codes.shape != weight.shape or int(codes.min()) < self.qmin or int(codes.max()) > self.qmax:
            raise EncodingError(
                f"codes of shape {tuple(codes.shape)} from {int(codes.min())} to {int(codes.max())} for {self.name!r} "
                f"of shape {tuple(weight.shape)}",
                f"give one in [{self.qmin}, {self.qmax}] for each weight",
            )
        if self.method.transforms:
            raise EncodingError(
                f"{self.name!r} cannot be given codes, since {self.method.name} transforms it",
                "choose another quantizer for this weight",
            )
        factor = self._spread_factor(weight)
        folded = _fold(weight, factor)
        grid = self._grid(folded)
        has_range = self.follows or self._has_range
        if scale is not None and not torch.equal(scale, grid[0]):
            if scale.shape != grid[0].shape or not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise EncodingError(
                    f"the scale of {self.name!r} is not of shape {tuple(grid[0].shape)}, or not positive and finite",
                    "give one that is",
                )
            grid, has_range = (scale, grid[1]), False
        values = numerics.dequantize(codes, *grid, self.scheme.granularity)
        written = (values if factor is None else values / factor).to(weight.dtype)
        again = numerics.quantize(_fold(written, factor), *grid, self.qmin, self.qmax, self.scheme.granularity)
        if not torch.equal(again, codes.to(torch.int32)):
            raise EncodingError(
                f"{self.name!r} in {weight.dtype} cannot hold its codes", "convert the model to float32 first"
            )
        new = dict(zip((self.scale, self.zero_point), grid, strict=True))
        if not has_range:
            bounds = numerics.representable_range(*grid, self.qmin, self.qmax)
            new |= zip((self.min_val, self.max_val), bounds, strict=True)
        elif self.follows:
            new |= zip((self.min_val, self.max_val), tensor_range(folded, self.scheme.granularity), strict=True)
        for buffer, value in new.items():
            buffer.copy_(value.reshape(buffer.shape))
        weight.copy_(written)
        self._note("ptq", method, has_range=has_range, loaded=True)
        self._start_learning()

    def _is_rounded(self, weight: Tensor) -> bool:
        """Tell whether the weight has the values of codes on the grid that the buffers keep."""
        if not self._loaded:
            return False
        folded = self._folded(weight)
        codes = numerics.quantize(folded, self.scale, self.zero_point, self.qmin, self.qmax, self.scheme.granularity)
        values = numerics.dequantize(codes, self.scale, self.zero_point, self.scheme.granularity)
        # the factor was divided out and multiplied in again
        return torch.allclose(folded, values, rtol=1e-6, atol=0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the float weight to keep where a user assigns `module.weight`: the assigned one."""
        return weight

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Set the buffers from the float weight by the scheme's observer; warn of channels that are all zero.

        Call it when calibration ends, and where the grid does not follow the weight whenever the weight or
        the statistics of the batch norm have moved. A weight that `set_codes` has written, and that has not moved
        since, keeps its grid.

        Raises:
            DataError: The weight, or its product with the factor, is not finite; it is named.
        """
        if self._is_rounded(weight):
            return
        folded = self._folded(weight)
        low, high = weight_range(folded, self.scheme, self.name)
        method = self.scheme.observer.name
        if self.scheme.granularity.kind != "per_group":
            magnitude = self.method.initial_magnitude(rows_of(folded, self.scheme.granularity))
            if magnitude is not None:
                low, high, method = -magnitude, magnitude, f"{self.method.name}, {self.method.options['init']}"
        self._set_range(low, high, "ptq", method)

    @torch.no_grad()
    def follow_batch_norm(self, weight: Tensor, before: Tensor | None) -> None:
        """Set the buffers after the batch norm's statistics have changed: where that can be, so that the codes stay.

        A grid by output channel is scaled like the folded weight. Others are set anew by `refresh`, but for learned
        ones, which stay.

        Args:
            weight: The float weight.
            before: What `factor` returned before.

        Raises:
            DataError: As `refresh`.
        """
        after, granularity = self.factor(), self.scheme.granularity
        by_channel = granularity.kind == "per_channel" and granularity.axis % weight.dim() == self.channel_axis
        scales = by_channel and self.groups == 1 and self.ready and not self.follows and not self.scheme.power_of_two
        if scales and after is not None and before is not None:
            if self.learning:
                self._keep_learned()
            if not self.learning or self._unit() is None:
                for buffer in (self.scale, self.min_val, self.max_val):
                    buffer.mul_((after / before).abs())
            self._start_learning()
        elif not self.method.names:
            self.refresh(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Encoding]:
        """Quantize the (folded) weight onto the grid that `forward` uses.

        Args:
            weight: The float weight, `module.parametrizations.weight.original`.

        Returns:
            Codes (int32, in the shape of the weight) of `w * f`, and their encoding. Its provenance is `qat`
            where the grid has moved since the last refresh, that is by training; else `ptq`, or that of the
            loaded encoding.

        Raises:
            DataError: The weight, or its product with the factor, is not finite; it is named.
            StateError: An observer's range was never set; the weight is named.
        """
        folded = self._folded(weight)
        if not bool(torch.isfinite(folded).all()):
            raise DataError(f"{self.name!r} holds nan or inf", "check the weights and the batch norm's statistics")
        scale, zero_point = self._grid(folded)
        q = numerics.quantize(folded, scale, zero_point, self.qmin, self.qmax, self.scheme.granularity)
        if self.learning:
            return q, self._learned_encoding(0)
        if not self.follows:
            return q, self._buffers_encoding(self._provenance or "ptq", self._method, 0, self._has_range)
        moved = self.ready and not (
            torch.equal(scale.reshape(-1), self.scale.reshape(-1))
            and torch.equal(zero_point.reshape(-1), self.zero_point.reshape(-1))
        )
        low, high = tensor_range(folded, self.scheme.granularity)
        encoding = Encoding.from_range(
            low.reshape(-1), high.reshape(-1), self.scheme, provenance="qat" if moved else "ptq"
        )
        return q, encoding


def _fold(weight: Tensor, factor: Tensor | None) -> Tensor:
    """Return the weight that is quantized, float32, without gradient."""
    folded = weight.detach().to(torch.float32)
    return folded if factor is None else folded * factor


def _scale_count(scheme: Scheme, shape: Sequence[int]) -> int:
    granularity = scheme.granularity
    if granularity.kind == "per_tensor":
        return 1
    if granularity.kind == "per_channel":
        return shape[granularity.axis]
    sizes = list(shape)
    sizes[granularity.axis] = -(-sizes[granularity.axis] // (granularity.size or 1))
    return math.prod(sizes)
