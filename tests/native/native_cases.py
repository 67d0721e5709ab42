"""Tensors of every layout with every kind of value, for hypothesis."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qat.scheme import int_type

NASTY = (
    0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4028234663852886e38, -3.4028234663852886e38, math.inf, -math.inf, math.nan,
    0.5, -0.5, 1.5, 2.5, -2.5, 8388607.5, 8388608.0, -8388609.0, 16777217.0, 0.05, 0.15000000596046448,
    struct.unpack("<f", struct.pack("<I", 0xFFC01234))[0],
)  # fmt: skip
DTYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
LAYOUTS = ("contiguous", "permuted", "strided", "expanded", "unaligned")


def make(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int, nasty: float) -> Tensor:
    """A tensor whose elements are nasty with this probability, and around the grid otherwise."""
    rng = np.random.default_rng(seed)

    def dense(sizes: tuple[int, ...], offset: int = 0) -> Tensor:
        n = math.prod(sizes) + offset
        values = rng.normal(0, rng.choice([0.1, 3.0, 100.0]), n).astype(np.float32)
        # ties between codes, and the values next to them
        values = np.where(rng.random(n) < 0.2, np.round(values * 4) / 8, values).astype(np.float32)
        values = np.where(rng.random(n) < nasty, rng.choice(np.array(NASTY, np.float32), n), values)
        return torch.from_numpy(values.astype(np.float32)).to(dtype)[offset:].view(sizes)

    order = rng.permutation(len(shape)).tolist()
    if layout == "permuted":
        return dense(tuple(shape[d] for d in order)).permute(np.argsort(order).tolist())
    if layout == "strided":
        return dense((*shape[:-1], 2 * shape[-1] + 1))[..., 1::2] if shape else dense(shape)
    if layout == "expanded":
        return dense(tuple(1 if d == order[0] else s for d, s in enumerate(shape))).expand(shape)
    return dense(shape, offset=int(rng.integers(1, 16)) if layout == "unaligned" else 0)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 9), min_size=0, max_size=5).map(tuple),
            st.tuples(st.integers(1, 3000)),
            st.tuples(st.integers(1, 2), st.sampled_from([3, 8, 16, 17, 40]), st.integers(1, 12), st.integers(1, 12)),
        )
    )
    return make(
        shape,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from([0.0, 0.1, 1.0])),
    )


@st.composite
def fake_quantizations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int, int | None]:
    """The arguments of `fake_quantize`."""
    x = draw(tensors())
    kind = int_type(draw(st.sampled_from(DTYPES)))
    qmin = draw(st.integers(kind.qmin, kind.qmax - 1))
    qmax = draw(st.integers(qmin + 1, kind.qmax))
    axis = draw(st.one_of(st.none(), st.integers(-x.dim(), x.dim() - 1))) if x.dim() else None
    count = 1 if axis is None else x.shape[axis]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = torch.rand(count, generator=generator) * draw(st.sampled_from([0.1, 1.0, 2.0**-40, 2.0**111, 1e-44]))
    scale = scale.clamp(min=1e-45)
    zero_point = torch.randint(qmin, qmax + 1, (count,), generator=generator)
    zero_point = zero_point.to(draw(st.sampled_from([torch.int32, torch.int64, torch.float32])))
    if axis is None and draw(st.booleans()):
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return x, scale, zero_point, qmin, qmax, axis


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, types and bit patterns; nan of any pattern is nan."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = a.contiguous().view(whole[a.dtype]) == b.contiguous().view(whole[b.dtype])
    return bool((same | (a.isnan() & b.isnan())).all())
