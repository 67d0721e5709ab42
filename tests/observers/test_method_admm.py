"""MNN's ADMM against its formulas, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qat import numerics
from qat.observers import make_observer, weight_range
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SYMMETRIC = Scheme("int8", symmetric=True, observer=ObserverSpec("admm"))


def half_away(x):
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


def reference_weights(w, clamp):
    """Section 4.2.3: 1000 turns for one channel."""
    w = np.asarray(w, dtype=np.float64)
    alpha = np.abs(w).max() / (1.25 * clamp)
    for _ in range(1000):
        q = np.clip(half_away(w / (alpha + 1e-9)), -clamp, clamp)
        alpha = (w * q).sum() / ((q * q).sum() + 1e-9)
    return alpha


def reference_activations(x, clamp):
    """Section 4.2.2: 300 turns."""
    x = np.asarray(x, dtype=np.float64)
    alpha = np.abs(x).max() / (2.5 * clamp)
    for _ in range(300):
        q = np.clip(half_away(x / alpha), -clamp, clamp)
        alpha = (q * x).sum() / (q * q).sum()
    return alpha


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(6, 40), (3, 8, 3, 3)])
def test_weights(dtype, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    how = Scheme(dtype, True, Granularity("per_channel", axis=0), ObserverSpec("admm"))
    scale, _ = numerics.range_to_scale(*weight_range(w, how, "w"), how)
    expected = [reference_weights(row.numpy(), how.int_type.qmax) for row in w.flatten(1)]
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_by_tensor_and_by_group():
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    scale, _ = numerics.range_to_scale(*weight_range(w, SYMMETRIC, "w"), SYMMETRIC)
    assert float(scale) == pytest.approx(reference_weights(w.flatten().numpy(), 127), rel=1e-6)
    how = SYMMETRIC.with_(granularity=Granularity("per_group", axis=1, size=4))
    scale, _ = numerics.range_to_scale(*weight_range(w, how, "w"), how)
    expected = [reference_weights(group.numpy(), 127) for group in w.reshape(8, 4)]
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "relu", "outlier"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_activations_by_the_means_of_bins(kind, dtype):
    x = torch.randn(20000, generator=torch.Generator().manual_seed(3))
    x = {"gaussian": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([12.0])])}[kind]
    how = SYMMETRIC.with_(dtype=dtype)
    observer = make_observer(ObserverSpec("admm", {"mantissa_bits": 10}), PER_TENSOR, None, "t")
    for part in x.split(3000):
        observer.observe(part)
    scale, _ = numerics.range_to_scale(*observer.range(how), how)
    # the fixed point depends on which elements round up: bins of a thousandth of their values move it a little
    assert float(scale) == pytest.approx(reference_activations(x.numpy(), how.int_type.qmax), rel=0.02)


def test_values_on_the_middle_of_bins_are_exact():
    # bins of 10 mantissa bits have their middles at odd multiples of 2**-11
    x = (2 * torch.randint(0, 1024, (4000,), generator=torch.Generator().manual_seed(3)) + 1) * 2.0**-11 + 1
    x *= torch.where(torch.arange(4000) % 3 == 0, -0.25, 1.0) * torch.where(torch.arange(4000) % 5 == 0, 2.0, 1.0)
    observer = make_observer(ObserverSpec("admm", {"mantissa_bits": 10}), PER_TENSOR, None, "t")
    observer.observe(x)
    scale, _ = numerics.range_to_scale(*observer.range(SYMMETRIC), SYMMETRIC)
    # but for the outermost bins, which end at the smallest and the largest element
    assert float(scale) == pytest.approx(reference_activations(x.numpy(), 127), rel=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "uint4"])
def test_affine_scales_are_a_fixed_point_and_keep_the_zero_point(dtype):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 2 + 1
    how = Scheme(dtype, observer=ObserverSpec("admm"))
    low, high = weight_range(x, how, "t")
    scale, zero_point = numerics.range_to_scale(low, high, how)
    assert int(zero_point) == int(numerics.range_to_scale(x.min(), x.max(), how)[1])
    q = np.clip(half_away(x.double().numpy() / float(scale)), -int(zero_point), how.int_type.qmax - int(zero_point))
    assert (q * x.double().numpy()).sum() / (q * q).sum() == pytest.approx(float(scale), rel=1e-4)

    def error(scale):
        back = numerics.dequantize(numerics.quantize(x, scale, zero_point, *how.code_range), scale, zero_point)
        return float((back - x).square().sum())

    # no turn makes it worse; it may end in a minimum that is not the least, so min-max may be better
    start = numerics.range_to_scale(x.min(), x.max(), how)[0] / 1.25
    assert error(scale) <= error(start)
