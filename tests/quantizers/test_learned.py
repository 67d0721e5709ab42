"""Fake quantization on a learned grid: analytic gradients in float64, in PyTorch and, where it is there, natively."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from learned_cases import cases, pytorch, run
from torch import Tensor

from qat.errors import EncodingError
from qat.quantizers import learned
from qat.quantizers.learned import fake_quantize_learned
from qat.quantizers.static import fake_quantize
from qat.scheme import PER_TENSOR, Granularity

PATHS = {"pytorch": pytorch, "chosen": learned.is_for_native}


def analytic(
    x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of x, scale and zero point by the formulas, element by element, in float64."""
    rows = [np.asarray(t.float().numpy(), np.float64) for t in (x, upstream)]
    if axis is None:
        rows = [r.reshape(1, -1) for r in rows]
    else:
        rows = [np.moveaxis(r, axis, 0).reshape(x.shape[axis], -1) for r in rows]
    dx, ds, dz = np.zeros_like(rows[0]), [], []
    for c, (values, gradients) in enumerate(zip(*rows, strict=True)):
        s, z = float(scale.reshape(-1)[c]), min(max(round(float(zero_point.reshape(-1)[c])), qmin), qmax)
        of_scale = of_zero = 0.0
        for i, (v, g) in enumerate(zip(values, gradients, strict=True)):
            # the code is that of float32 arithmetic, the contract's; everything after it is float64
            code = np.rint(np.float32(v) / np.float32(s)).astype(np.float64) + z
            if code < qmin:
                of_scale, of_zero = of_scale + g * (qmin - z), of_zero - g * s
            elif code > qmax:
                of_scale, of_zero = of_scale + g * (qmax - z), of_zero - g * s
            else:
                of_scale += g * (code - z - v / s)
                dx[c, i] = g
        ds.append(of_scale)
        dz.append(of_zero)
    if axis is None:
        return dx.reshape(x.shape), np.array(ds), np.array(dz)
    moved = np.moveaxis(x.float().numpy(), axis, 0).shape
    return np.moveaxis(dx.reshape(moved), 0, axis), np.array(ds), np.array(dz)


@settings(max_examples=60)
@given(cases())
@pytest.mark.parametrize("path", PATHS)
def test_value_and_gradients_by_the_formulas(
    path: str, case: tuple[Tensor, Tensor, Tensor, int, int, int | None]
) -> None:
    x, scale, zero_point, qmin, qmax, axis = case
    y, dx, ds, dz = run(case, 0.25, PATHS[path])
    granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
    whole = torch.round(zero_point).clamp(qmin, qmax)
    assert torch.equal(y, fake_quantize(x, scale, whole, qmin, qmax, granularity))
    upstream = torch.linspace(-1, 1.5, x.numel()).reshape(x.shape).to(x.dtype)
    expected_dx, expected_ds, expected_dz = analytic(x, upstream, scale, zero_point, qmin, qmax, axis)
    assert np.array_equal(dx.float().numpy(), expected_dx)
    bound = 1e-5 * float(upstream.float().abs().sum()) * (qmax - qmin)
    assert np.abs(ds.reshape(-1).numpy() - 0.25 * expected_ds).max() <= bound
    assert np.abs(dz.reshape(-1).numpy() - 0.25 * expected_dz).max() <= bound
    assert ds.shape == scale.shape
    assert dz.shape == zero_point.shape


def test_a_grid_too_small_grows_and_a_zero_point_moves_towards_the_data() -> None:
    x = torch.linspace(0.0, 10.0, 100)
    scale, zero_point = torch.tensor(0.1, requires_grad=True), torch.tensor(8.0, requires_grad=True)
    before = float(((fake_quantize_learned(x, scale, zero_point, 0, 15) - x) ** 2).mean().detach())
    for _ in range(200):
        loss = ((fake_quantize_learned(x, scale, zero_point, 0, 15) - x) ** 2).mean()
        ds, dz = torch.autograd.grad(loss, (scale, zero_point))
        with torch.no_grad():
            scale -= 0.0005 * ds
            zero_point -= 0.5 * dz
    assert float(loss.detach()) < before / 20
    assert float(scale.detach()) > 0.3


def test_nan_and_infinity() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.2])
    for path in PATHS.values():
        y, dx, ds, dz = run((x, torch.tensor(0.5), torch.tensor(3.2), 0, 15, None), 1.0, path)
        upstream = torch.linspace(-1, 1.5, 4)
        assert y.tolist() == [0.0, 6.0, -1.5, 0.0]
        assert dx.tolist() == [0.0, 0.0, 0.0, float(upstream[3])]
        inside = 1.5 * (0.0 - float(torch.tensor(0.2) / 0.5))
        assert float(ds) == pytest.approx(float(upstream[1]) * 12 + float(upstream[2]) * -3 + inside, rel=1e-6)
        assert float(dz) == pytest.approx(-0.5 * float(upstream[1] + upstream[2]), rel=1e-6)


def test_too_few_scales_are_an_error() -> None:
    with pytest.raises(EncodingError, match="2 scales for 3 channels"):
        fake_quantize_learned(torch.ones(3, 2), torch.ones(2), torch.zeros(2), 0, 15, Granularity("per_channel", 0))
