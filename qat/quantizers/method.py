"""`Method`: how the grid of a fake quantizer comes about in training; and the static one.

A `Quantizer` owns buffers and parameters, phases and state. Its method, which has no state, says which parameters there
are, which values they start from, which grid they make, and how a tensor is fake-quantized so that they get their
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from qat import numerics
from qat.observers.options import Option
from qat.quantizers.learned import fake_quantize_learned
from qat.scheme import Scheme

Role = Literal["activation", "weight"]

#: What is learned as a scale or a range never gets smaller than this times where it started from. The gradient that
#: would push it further down is dropped there, so it comes back as soon as the loss wants it to.
FLOOR = 2.0**-8
#: of every quantizer of activations
DROP = Option(float, 0.0, 0.0, 1.0, about="probability with which an element keeps its float value in training (QDrop)")


class Start(NamedTuple):
    """The grid that learning starts from: calibrated, loaded, or kept when learning last stopped.

    Attributes:
        scale: float32, one or (count,).
        zero_point: int32, likewise.
        low: The range that the grid was made from, float32, likewise.
        high: Its upper end.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor


class Method:
    """How a quantizer's grid comes about; as it stands here without parameters, it is that of the buffers.

    Args:
        scheme: Of the tensor.
        role: Whether it is an activation or a weight.
        options: The options; `OPTIONS` says which are legal, and the registry checks them.

    Attributes:
        OPTIONS: Legal options by name, besides `drop`, which every quantizer of an activation has.
        name: Registered name.
        roles: What the method is for.
        about: What it does, in a line, for the table of quantizers.
        source: Where it comes from, likewise.
        follows: In training, a moving average of the batches' ranges moves the range.
        power_of_two: Its scales are powers of two, whatever the scheme says.
        clips: The gradients of the grid are those of a learned clip.
        homogeneous: Parameters times a number make the grid of a tensor times that number.
        options: The value of every option.
        levels: Steps of the grid above zero where it is symmetric, else in all.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    name: ClassVar[str] = ""
    roles: ClassVar[tuple[Role, ...]] = ("activation", "weight")
    about: ClassVar[str] = ""
    source: ClassVar[str] = ""
    follows: ClassVar[bool] = False
    power_of_two: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False

    def __init__(self, scheme: Scheme, role: Role, **options: Any) -> None:
        self.scheme, self.role = scheme, role
        self.options: dict[str, Any] = {key: option.default for key, option in self.OPTIONS.items()} | options
        self.qmin, self.qmax = scheme.code_range
        self.levels = self.qmax - (scheme.symmetric_zero_point if scheme.symmetric else self.qmin)
        #: probability with which an element keeps its float value in training
        self.drop = float(self.options.get("drop", 0.0))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, each of the shape of the scale."""
        return ()

    def values(self, start: Start) -> Sequence[Tensor]:  # noqa: ARG002
        """Return values of the parameters that make the grid of `start`, float32."""
        return ()

    def refusal(self, start: Start) -> str | None:  # noqa: ARG002
        """Say why the parameters cannot make a grid, or return None where they can."""
        return None

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, float32, differentiable; the nearest code is the zero point that is used."""
        raise NotImplementedError(f"{self.name} has no parameters")

    def fake_quantize(self, x: Tensor, parameters: Sequence[Tensor], start: Start) -> Tensor:
        """Return `x` fake-quantized on the grid of the parameters, in its shape and dtype, with their gradients."""
        scale, zero_point = self.grid(parameters, start)
        factor = self.gradient_factor(x, scale.numel())
        return fake_quantize_learned(
            x, scale, zero_point, self.qmin, self.qmax, self.scheme.granularity, factor, clips=self.clips
        )

    @property
    def learns_grid(self) -> bool:
        """Whether `fake_quantize` is no other than here: the grid, and the gradients of `fake_quantize_learned`."""
        return bool(self.names) and type(self).fake_quantize is Method.fake_quantize

    def gradient_factor(self, x: Tensor, count: int) -> float:  # noqa: ARG002
        """Return what the gradients of scale and zero point are multiplied with; `count` is their number."""
        return 1.0

    def transform(self, weight: Tensor) -> Tensor:
        """Return what is quantized in place of a weight, differentiable; float32 unless it is the weight itself."""
        return weight

    def untransform(self, values: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """Return what `transform` makes `values` of, as elements of `weight` that are not its largest."""
        return values

    @property
    def transforms(self) -> bool:
        """Whether `transform` changes anything."""
        return False

    def initial_magnitude(self, rows: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return the magnitude that a symmetric weight's range starts from, (R,); None for that of its observer.

        Args:
            rows: What is quantized, one row a scale, (R, K), float32.
        """
        return None

    def penalty(self, parameters: Sequence[Tensor]) -> Tensor | None:  # noqa: ARG002
        """Return a term of the loss, a scalar, or None."""
        return None


class Static(Method):
    """The grid of calibration, moved by the ranges of the batches; see `qat.quantizers.static`."""

    name = "static"
    about = "calibrated range, then a moving average of the batches' ranges; of weights the range of their observer"
    source = "Jacob et al., CVPR 2018"
    follows = True


def at_least(value: Tensor, floor: Tensor | float) -> Tensor:
    """Return the larger of both; its gradient is that of `value`, but where that is below and would go on falling."""
    limit = floor if isinstance(floor, Tensor) else torch.full_like(value, floor)
    # mostly nothing is below, and then the graph needs no node; on a GPU the question would wait. Without gradients the
    # result may be kept, so it is never the parameter itself
    can_ask = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_ask and torch.is_grad_enabled() and value.requires_grad and not bool((value < limit).any()):
        return value
    out: Tensor = _AtLeast.apply(value, limit)  # type: ignore[no-untyped-call]
    return out


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(value < floor)
        return torch.maximum(value, floor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (below,) = ctx.saved_tensors
        # descent subtracts the gradient
        return torch.where(below & (grad > 0), 0.0, grad), None


def power_of_two(exponent: Tensor) -> Tensor:
    """Return `2**ceil(exponent)`, exact in float32, for exponents in [-126, 127]; rounding up has the gradient 1."""
    out: Tensor = _PowerOfTwo.apply(exponent)  # type: ignore[no-untyped-call]
    return out


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exponent: Tensor) -> Tensor:
        # the exponent's own bits: exp2 may round
        power = ((torch.ceil(exponent).to(torch.int32) + 127) << 23).view(torch.float32)
        ctx.save_for_backward(power)
        return power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (power,) = ctx.saved_tensors
        slope: Tensor = grad * power * math.log(2.0)
        return slope


def range_of_grid(start: Start, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value that has a code of its own, float32."""
    return numerics.representable_range(start.scale, start.zero_point, qmin, qmax)
