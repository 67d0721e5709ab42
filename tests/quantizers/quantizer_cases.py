"""Quantizers for tests: made with a grid, in training, and the papers' formulas as float64 autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qat.encoding import Encoding
from qat.quantizers import TRACK, FakeQuantize, WeightFakeQuantize
from qat.scheme import Granularity, QuantizerSpec, Scheme

UINT4 = Scheme("uint4")
INT4 = Scheme("int4", symmetric=True, qmin=-7)
CHANNELS = INT4.with_(granularity=Granularity("per_channel", 0))
GROUPS = INT4.with_(granularity=Granularity("per_group", 1, 4))
LEARNED = ("lsq", "lsq_plus", "pact", "tqt", "ulq")
LEARNED_WEIGHTS = ("lsq", "lsq_plus", "tqt", "ulq")


def with_quantizer(scheme: Scheme, name: str, **options: Any) -> Scheme:
    return scheme.with_(quantizer=QuantizerSpec(name, options))


def encoding(scheme: Scheme, scale: Any, zero_point: Any) -> Encoding:
    scales, zeros = (tuple(torch.as_tensor(v).reshape(-1).tolist()) for v in (scale, zero_point))
    return Encoding(
        dtype=scheme.dtype, scale=scales, zero_point=zeros, qmin=scheme.code_range[0], qmax=scheme.code_range[1],
        symmetric=scheme.symmetric, granularity=scheme.granularity, method="given",
    )  # fmt: skip


def activation(scheme: Scheme, name: str, scale: float, zero_point: int, **options: Any) -> FakeQuantize:
    """A quantizer of an activation that learns from this grid."""
    quantizer = FakeQuantize(with_quantizer(scheme, name, **options), "x").train()
    quantizer.load_encoding(encoding(scheme, scale, zero_point))
    quantizer.set_phase(TRACK)
    return quantizer


def weight(scheme: Scheme, name: str, values: Tensor, bn: Any = None, **options: Any) -> WeightFakeQuantize:
    """A quantizer of a weight that learns from the grid of its observer."""
    quantizer = WeightFakeQuantize(with_quantizer(scheme, name, **options), "w", values.shape, bn).train()
    quantizer.refresh(values)
    quantizer.set_phase(TRACK)
    return quantizer


@st.composite
def grids(draw: st.DrawFn) -> tuple[Scheme, float, int]:
    """A scheme per tensor, and a grid of it."""
    scheme = draw(st.sampled_from([UINT4, INT4, Scheme("uint8"), Scheme("int8"), Scheme("uint8", qmax=15)]))
    low, high = scheme.code_range
    zero_point = scheme.symmetric_zero_point if scheme.symmetric else draw(st.integers(low, high))
    return scheme, draw(st.floats(0.01, 2.0)), zero_point


def values_off_borders(seed: int, shape: tuple[int, ...], scale: float, width: int) -> Tensor:
    """Values up to `width` steps from zero, none near the border of two codes, float32."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-width, width + 1, shape, generator=generator)
    return (scale * (steps + 0.8 * torch.rand(shape, generator=generator) - 0.4)).float()


# -- the papers in float64; roundings are straight through, all else is left to autograd


def straight(rounded: Tensor, x: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def scaled(x: Tensor, factor: float) -> Tensor:
    """`x` with its gradient times a factor (the function `gradscale` of LSQ's appendix)."""
    return x * factor + (x * (1 - factor)).detach()


def on_grid(x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> Tensor:
    # clamped after the rounding, as everywhere in qat: what is less than half a step outside is inside
    codes = torch.clamp(straight(torch.round(x / s), x / s) + z, qmin, qmax)
    return (codes - z) * s


def lsq(x: Tensor, step: Tensor, z: float, qmin: int, qmax: int, factor: float) -> Tensor:
    return on_grid(x, scaled(step, factor), torch.tensor(z, dtype=torch.float64), qmin, qmax)


def lsq_plus(x: Tensor, step: Tensor, offset: Tensor, qmin: int, qmax: int, factor: float) -> Tensor:
    s, beta = scaled(step, factor), scaled(offset, factor)
    steps = (x - beta) / s
    return torch.clamp(straight(torch.round(steps), steps), qmin, qmax) * s + beta


def pact(x: Tensor, alpha: Tensor, levels: int) -> Tensor:
    clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    steps = (clipped * levels / alpha).detach()
    return straight(torch.round(steps) * alpha.detach() / levels, clipped)


def tqt(x: Tensor, log2_threshold: Tensor, z: float, qmin: int, qmax: int, bits: int) -> Tensor:
    exponent = straight(torch.ceil(log2_threshold), log2_threshold)
    return on_grid(x, torch.exp2(exponent) / 2.0**bits, torch.tensor(z, dtype=torch.float64), qmin, qmax)


def ulq(x: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int) -> Tensor:
    s = (high - low) / (qmax - qmin)
    z = qmin - low / s
    return on_grid(x, s, straight(torch.round(z), z), qmin, qmax)


def lsq_factor(x: Tensor, levels: int) -> float:
    return 1.0 / math.sqrt(x[0].numel() * levels)
