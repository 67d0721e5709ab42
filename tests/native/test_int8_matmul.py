"""Products of two 8-bit or 16-bit activations of every instruction set against PyTorch's reference, code by code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_layers import DTYPES, RANGES, padded

from qat import native
from qat.integer.kernels.linear import matmul
from qat.integer.kernels.qparams import QParams

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")

KINDS = st.sampled_from(["u8", "s8", "u8", "s8", "u16", "s16"])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(1, 140)),
    st.tuples(KINDS, KINDS, KINDS),
    st.booleans(),
    st.data(),
)
def test_product(
    sizes: tuple[int, int, int, int], kinds: tuple[str, str, str], flip: bool, data: st.DataObject
) -> None:
    batch, m, k, n = sizes
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    grids = []
    for kind, scale in zip(kinds, (0.02, 0.03, data.draw(st.sampled_from([0.001, 0.5, 3.0]))), strict=True):
        low, high = RANGES[kind]
        grids.append(QParams(scale, data.draw(st.integers(low, high)), low, high))
    a = torch.randint(RANGES[kinds[0]][0], RANGES[kinds[0]][1] + 1, (batch, m, k))
    b = torch.randint(RANGES[kinds[1]][0], RANGES[kinds[1]][1] + 1, (batch, k, n))
    expected = matmul(a, grids[0], b, grids[1], grids[2])
    right = b.transpose(1, 2).contiguous() if flip else b
    for isa in ("portable", "avx2", "avxvnni", "avx512vnni"):
        if torch.ops.qat._int8_isa(isa) != isa:
            continue
        y = torch.zeros(batch, m, n, dtype=torch.int32).to(DTYPES[kinds[2]])
        ints = [int(i) for g in grids for i in (g.zero_point, g.qmin, g.qmax, g.wide)]
        torch.ops.qat._int8_matmul(
            isa,
            padded(a, DTYPES[kinds[0]]),
            right.to(DTYPES[kinds[1]]),
            flip,
            ints,
            [g.scale for g in grids],
            y,
        )
        assert torch.equal(y.to(torch.int32), expected), isa
