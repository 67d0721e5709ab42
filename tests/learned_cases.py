"""Cases of fake quantization on learned grids, for hypothesis, and one pass through a chosen path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from qat.quantizers import learned
from qat.quantizers.learned import fake_quantize_learned
from qat.scheme import PER_TENSOR, Granularity


def pytorch(*_: object) -> bool:
    """Stands in for `is_for_native`: nothing is."""
    return False


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int, int | None]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.3, 3.0]))
    if len(shape) == 4 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    x = x.to(draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])))
    axis = draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
    count = () if axis is None else (shape[axis],)
    scale = torch.rand(count, generator=generator) * 0.2 + 0.05
    qmin, qmax = draw(st.sampled_from([(0, 15), (-8, 7), (-4, 3), (0, 255)]))
    zero_point = torch.rand(count, generator=generator) * (qmax - qmin + 6) + qmin - 3
    return x, scale, zero_point, qmin, qmax, axis


def run(
    case: tuple[Tensor, Tensor, Tensor, int, int, int | None], grad_scale: float, path: object, clips: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, scale, zero_point, qmin, qmax, axis = case
    granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
    leaves = [t.detach().clone().requires_grad_() for t in (x, scale, zero_point)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "is_for_native", path)
        y = fake_quantize_learned(*leaves, qmin, qmax, granularity, grad_scale, clips=clips)
        upstream = torch.linspace(-1, 1.5, x.numel()).reshape(x.shape).to(x.dtype)
        return (y.detach(), *torch.autograd.grad(y, leaves, upstream))
