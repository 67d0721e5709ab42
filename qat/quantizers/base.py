"""What all quantizers share: the grid in buffers, phases, provenance, and how these are saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qat import native, numerics
from qat.encoding import Encoding, Provenance, warn_of_floor
from qat.errors import CheckpointError, EncodingError, SchemeError, StateError
from qat.observers import resolve_observer
from qat.quantizers.method import Role, Start
from qat.quantizers.packing import pack_state, unpack_state
from qat.quantizers.processes import is_distributed, with_zero_gradients
from qat.quantizers.registry import make_method, resolve_quantizer
from qat.scheme import Granularity, Scheme

_WIDEST = 16


@dataclass(frozen=True)
class Phase:
    """What quantizers do in a forward pass.

    Attributes:
        observing: Feed values to the observer (calibration).
        quantizing: Fake-quantize.
        tracking: Let the range move: in training mode by a moving average of the batches' ranges, or by what the
            quantizer has learned.
    """

    observing: bool = False
    quantizing: bool = False
    tracking: bool = False


class Quantizer(nn.Module):
    """Base of the fake quantizers: a grid, phases and provenance.

    Buffers, with their final shapes from construction (() for per-tensor, else (count,)): `scale` float32,
    `zero_point` int32, and the range they came from, `min_val` and `max_val` float32, which is empty (min
    above max) where nothing is known. They stay float32 when a model is cast to half precision.

    A learned quantizer (`method`) has parameters besides, float32, in the shape of the scale. They start from the
    grid in the buffers whenever that is calibrated or loaded, and while *tracking* the grid is theirs (`grid`). Where
    tracking ends the buffers take that grid over: the quantizer then is a static one, and the parameters get no
    gradient, so optimizers leave them alone. Where it starts again they go on from the buffers. `requires_grad`
    never changes. Where several processes train, parameters that are not in use get a gradient of zero, since
    DistributedDataParallel waits for all of them; what momentum makes of that is undone when tracking starts again.

    The phases `observing`, `quantizing` and `tracking` are plain booleans: they cost no device
    synchronisation, and `torch.compile` one recompilation when they change. With the provenance of the range
    they are saved as extra state.

    Args:
        scheme: How the tensor is quantized, to codes of at most 16 bits.
        name: Name of the tensor, for messages.
        count: Number of scales.
        role: Whether it is an activation or a weight.

    Raises:
        SchemeError: The scheme asks for a quantizer that is not there or not for this tensor, for options that it has
            not, or for wider codes; the tensor is named.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, scheme: Scheme, name: str, count: int, role: Role) -> None:
        super().__init__()
        if scheme.int_type.bits > _WIDEST:
            raise SchemeError(f"{name!r} cannot be fake-quantized to {scheme.dtype}", "use 16 bits or fewer")
        try:
            quantizer = resolve_quantizer(scheme.quantizer, role)
            #: how the grid comes about
            self.method = make_method(scheme, role)
        except SchemeError as error:
            raise SchemeError(f"{name!r}: {error}") from None
        # another system's name of an observer would hide what it is from whoever asks
        self.scheme = scheme = scheme.with_(
            observer=resolve_observer(scheme.observer),
            quantizer=quantizer,
            power_of_two=scheme.power_of_two or self.method.power_of_two,
        )
        self.name = name
        #: how a range becomes the grid, for the native extension
        self.rule = native.GridRule(
            *scheme.code_range,
            axis=None if scheme.granularity.kind == "per_tensor" else scheme.granularity.axis,
            symmetric=scheme.symmetric,
            middle=scheme.symmetric_zero_point,
            power_of_two=scheme.power_of_two,
        )
        self.observing = False
        self.quantizing = False
        self.tracking = False
        #: whether the buffers hold a grid that was calibrated, tracked, fixed or loaded
        self.ready = False
        self._provenance: Provenance | None = None
        self._loaded = False
        self._method = ""
        self._has_range = False
        shape = () if scheme.granularity.kind == "per_tensor" else (count,)
        self.register_buffer("scale", torch.ones(shape))
        zero = scheme.symmetric_zero_point if scheme.symmetric else min(max(0, self.qmin), self.qmax)
        self.register_buffer("zero_point", torch.full(shape, zero, dtype=torch.int32))
        self.register_buffer("min_val", torch.full(shape, torch.inf))
        self.register_buffer("max_val", torch.full(shape, -torch.inf))
        for parameter in self.method.names:
            self.register_parameter(parameter, nn.Parameter(torch.ones(shape)))

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return self.scheme.code_range[0]

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.scheme.code_range[1]

    @property
    def phase(self) -> Phase:
        """The phase that this quantizer is in."""
        return Phase(self.observing, self.quantizing, self.tracking)

    def set_phase(self, phase: Phase) -> None:
        """Enter a phase; where tracking starts or ends, the learned grid is taken over (reads the device)."""
        if self.method.names and self.ready and phase.tracking != self.tracking:
            if self.tracking:
                self._keep_learned()
            elif not self._is_nearly_kept():
                self._start_learning()
        self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.observing, self.quantizing, self.tracking = phase.observing, phase.quantizing, phase.tracking

    # -- learned grids

    def learned_parameters(self) -> tuple[Tensor, ...]:
        """Return the parameters of the method, in its order; none for a static quantizer."""
        return tuple(self._parameters[name] for name in self.method.names)  # type: ignore[misc]

    @property
    def learning(self) -> bool:
        """Whether the grid is that of learned parameters."""
        return self.tracking and bool(self.method.names)

    @property
    def held(self) -> Start:
        """The buffers."""
        return Start(self.scale, self.zero_point, self.min_val, self.max_val)

    @property
    def start(self) -> Start:
        """Where learning starts from, in the units of the parameters."""
        return self.held

    def parameter_grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point that the parameters make, float32, with their gradients."""
        return self.method.grid(self.learned_parameters(), self.start)

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scale (float32) and zero point (int32) as the forward pass uses them, in the shape of the buffers.

        Raises:
            StateError: There is no range yet; the tensor is named.
        """
        if not self.ready:
            raise self._no_range()
        return self._learned_grid() if self.learning else (self.scale, self.zero_point)

    @torch.no_grad()
    def _learned_grid(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parameter_grid()
        return scale, torch.round(zero_point).clamp(self.qmin, self.qmax).to(torch.int32)

    def _is_kept(self, grid: tuple[Tensor, Tensor]) -> bool:
        """Tell whether the buffers hold this grid."""
        return torch.equal(grid[0], self.scale) and torch.equal(grid[1], self.zero_point)

    def _is_nearly_kept(self) -> bool:
        """Tell whether the parameters still make the grid of the buffers, but for the rounding of float32."""
        scale, zero_point = self._learned_grid()
        return torch.allclose(scale, self.scale, rtol=1e-6, atol=0.0) and torch.equal(zero_point, self.zero_point)

    @torch.no_grad()
    def _keep_learned(self) -> None:
        """Let the buffers hold the learned grid."""
        grid = self._learned_grid()
        if self._is_kept(grid):
            return
        low, high = numerics.representable_range(*grid, self.qmin, self.qmax)
        for buffer, value in zip(self.held, (*grid, low, high), strict=True):
            buffer.copy_(value)
        self._note("qat", self.method.name, has_range=False)

    @torch.no_grad()
    def _start_learning(self) -> None:
        """Let the parameters make the grid that the buffers hold."""
        for parameter, value in zip(self.learned_parameters(), self.method.values(self.start), strict=True):
            parameter.copy_(value)

    def _anchored(self, y: Tensor) -> Tensor:
        """Return `y` such that parameters that are not in use get a gradient of zero, where processes wait for one."""
        if not self.is_anchored or not torch.is_grad_enabled():
            return y
        return with_zero_gradients(y, self.learned_parameters())

    @property
    def is_anchored(self) -> bool:
        """Whether the forward pass adds parameters to the graph that it does not use."""
        unused = not self.quantizing or not self.learning
        return bool(self.method.names) and self.training and unused and is_distributed()

    def _learned_encoding(self, samples: int) -> Encoding:
        """Return the encoding of the learned grid; where that has not moved, of the buffers."""
        grid = self.grid()
        if self._is_kept(grid):
            return self._buffers_encoding(self._provenance or "ptq", self._method, samples, self._has_range)
        return self._encoding_of(grid, None, "qat", self.method.name, samples)

    def _no_range(self) -> StateError:
        return StateError(f"{self.name!r} has no range yet", "calibrate the model first")

    # -- where the grid comes from

    def _note(self, provenance: Provenance | None, method: str, *, has_range: bool, loaded: bool = False) -> None:
        """Record where the grid comes from."""
        self._provenance, self._method, self._has_range, self._loaded = provenance, method, has_range, loaded
        # a bool of its own: `torch.compile` then guards on it and not on the provenance
        self.ready = provenance is not None

    def _set_range(self, low: Tensor, high: Tensor, provenance: Provenance, method: str) -> None:
        """Set the buffers from a range; warn where it is empty, or too small for a scale of its own.

        Raises:
            EncodingError: The range is not finite or inverted; the tensor is named.
        """
        try:
            scale, zero_point = numerics.range_to_scale(low, high, self.scheme)
        except EncodingError as error:
            raise EncodingError(f"{self.name!r}: {error}") from None
        warn_of_floor(self.name, scale, stacklevel=2)
        for buffer, value in (
            (self.scale, scale), (self.zero_point, zero_point), (self.min_val, low), (self.max_val, high),
        ):  # fmt: skip
            buffer.copy_(value.reshape(buffer.shape))
        self._note(provenance, method, has_range=True)
        self._start_learning()

    def load_encoding(self, encoding: Encoding) -> None:
        """Take the grid, range and provenance of an encoding.

        Raises:
            EncodingError: Its dtype, integer range, granularity, symmetry or number of scales is not this
                tensor's, or its scale is not one that the quantizer can learn from.
        """
        mend = "change the scheme of this tensor, or the encoding"
        mine, theirs = (
            self._grid_kind(),
            _kind(encoding.dtype, encoding.qmin, encoding.qmax, encoding.granularity),
        )
        if mine != theirs:
            raise EncodingError(f"the encoding of {self.name!r} is {theirs} and its scheme is {mine}", mend)
        if len(encoding.scale) != self.scale.numel():
            raise EncodingError(
                f"the encoding of {self.name!r} has {len(encoding.scale)} scales and the tensor "
                f"has {self.scale.numel()}",
                "give the encoding of this model",
            )
        middle = self.scheme.symmetric_zero_point
        if self.scheme.symmetric and any(z != middle for z in encoding.zero_point):
            raise EncodingError(f"the encoding of {self.name!r} is not symmetric and its scheme is", mend)
        has_range = encoding.min is not None and encoding.max is not None
        if encoding.min is not None and encoding.max is not None:
            low, high = torch.tensor(encoding.min), torch.tensor(encoding.max)
        else:
            # a moving average needs somewhere to start from
            low, high = numerics.representable_range(
                encoding.scale_tensor, encoding.zero_point_tensor, encoding.qmin, encoding.qmax
            )
        given = Start(encoding.scale_tensor, encoding.zero_point_tensor, low, high)
        refused = self.method.refusal(given)
        if refused is not None:
            raise EncodingError(f"the encoding of {self.name!r} is not for {self.method.name}: {refused}", mend)
        for buffer, value in zip(self.held, given, strict=True):
            buffer.copy_(value.reshape(buffer.shape))
        self._note(encoding.provenance, encoding.method, has_range=has_range, loaded=True)
        self._start_learning()

    def _buffers_encoding(self, provenance: Provenance, method: str, samples: int, has_range: bool) -> Encoding:
        """Return the encoding of what the buffers hold."""
        observed = (self.min_val, self.max_val) if has_range else None
        return self._encoding_of((self.scale, self.zero_point), observed, provenance, method, samples)

    def _encoding_of(
        self,
        grid: tuple[Tensor, Tensor],
        observed: tuple[Tensor, Tensor] | None,
        provenance: Provenance,
        method: str,
        samples: int,
    ) -> Encoding:
        scale, zero_point = (tuple(value.detach().reshape(-1).tolist()) for value in grid)
        low, high = (tuple(bound.reshape(-1).tolist()) for bound in observed) if observed else (None, None)
        return Encoding(
            dtype=self.scheme.dtype,
            scale=scale,
            zero_point=zero_point,
            qmin=self.qmin,
            qmax=self.qmax,
            symmetric=self.scheme.symmetric,
            granularity=self.scheme.granularity,
            min=low,
            max=high,
            provenance=provenance,
            method=method,
            samples=samples,
        )

    def _grid_kind(self) -> str:
        return _kind(self.scheme.dtype, self.qmin, self.qmax, self.scheme.granularity)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Quantizer:
        # `model.half()` must not round scales: an activation's codes would no longer be those of the export
        def exactly(value: Tensor) -> Tensor:
            moved: Tensor = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(exactly, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        """Return phases and provenance as a uint8 tensor."""
        return pack_state(
            {
                "grid": self._grid_kind(),
                "phase": [self.observing, self.quantizing, self.tracking],
                "provenance": self._provenance,
                "method": self._method,
                "has_range": self._has_range,
                "loaded": self._loaded,
            }
        )

    def set_extra_state(self, state: object) -> None:
        """Restore phases and provenance.

        Raises:
            CheckpointError: The state is malformed, or of a tensor with another integer type, range or
                granularity.
        """
        values = self.read_extra_state(state)
        # parameters and buffers are those of the state already
        self._enter(Phase(*values["phase"]))
        self._note(values["provenance"], values["method"], has_range=values["has_range"], loaded=values["loaded"])

    def read_extra_state(self, state: object) -> dict[str, Any]:
        """Check extra state, and unpack it, without restoring anything.

        Raises:
            CheckpointError: As `set_extra_state`.
        """
        values = unpack_state(state, self.name)
        if values.get("grid") != self._grid_kind():
            raise CheckpointError(
                f"the checkpoint has {self.name!r} as {values.get('grid')} and the model as {self._grid_kind()}",
                "prepare the model with the scheme of the checkpoint",
            )
        phase, provenance, method = values.get("phase"), values.get("provenance"), values.get("method")
        if (
            not isinstance(phase, list)
            or len(phase) != len(("observing", "quantizing", "tracking"))
            or not all(isinstance(v, bool) for v in [*phase, values.get("has_range"), values.get("loaded")])
            or (provenance is not None and provenance not in get_args(Provenance))
            or not isinstance(method, str)
        ):
            raise CheckpointError(
                f"the extra state of {self.name!r} is malformed",
                "load a checkpoint that this version of qat wrote",
            )
        return values

    def extra_repr(self) -> str:
        """Return scheme and phases for `print(model)`."""
        phases = [p for p in ("observing", "quantizing", "tracking") if getattr(self, p)]
        return f"{self.name!r}, {self.scheme.describe()}, {'+'.join(phases) or 'float'}"


def _kind(dtype: str, qmin: int, qmax: int, granularity: Granularity) -> str:
    place: str = granularity.kind
    if granularity.kind == "per_channel":
        place += f"({granularity.axis})"
    if granularity.kind == "per_group":
        place += f"({granularity.axis}, {granularity.size})"
    return f"{dtype} [{qmin}, {qmax}] {place}"
