"""Gradients of projected outputs, and `auto` by the error of the outputs, against Jacobians computed whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat import numerics
from qat.algorithms.output_error import random_signs, score_signs, visit_gradients
from qat.graph.prepared import PreparedModel
from qat.observers import AutoObserver

pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")


class Net(nn.Module):
    """Operators in place behind quantizers, and a tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.side(y)
        z += y
        return self.head(F.relu(z, inplace=True).mean((2, 3)))


def images(count: int = 60) -> Tensor:
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x[5, 0, 2, 2] = 40.0
    return x


def prepared(observer: Any = "auto") -> PreparedModel:
    torch.manual_seed(0)
    scheme = {"activations": {"observer": observer}}
    return qat.prepare(Net().eval(), images()[:2], target=qat.load_target("onnxruntime-cpu"), scheme=scheme)


def test_the_gradient_is_that_of_the_signed_outputs() -> None:
    qmodel, x = prepared(), images(7)
    qmodel.eval().set_phase("float")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in qmodel.activation_quantizers()}
    visit_gradients(
        qmodel,
        qmodel.activation_quantizers(),
        [(x,)],
        {name: lambda value, gradient, to=to: to.append((value, gradient)) for name, to in seen.items()},
    )
    torch.manual_seed(0)
    net = Net().eval()
    signs = random_signs((x,), torch.Size((7, 4)))
    y = net.conv(x).detach().requires_grad_()
    scores = net.head(F.relu(net.side(y) + y).mean((2, 3)))
    (scores * score_signs(signs, scores.detach())).sum().backward()
    assert y.grad is not None
    ((value, gradient),) = seen["conv"]
    torch.testing.assert_close(value, y.detach())
    torch.testing.assert_close(gradient, y.grad)
    (given,) = seen["x"]
    assert torch.equal(given[0], x)
    assert all(p.requires_grad and p.grad is None for p in qmodel.parameters())


def test_signs_depend_on_the_sample_alone_and_are_balanced() -> None:
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    signs = random_signs((x,), torch.Size((4000, 6)))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(random_signs((x[17:40],), torch.Size((23, 6))), signs[17:40])
    assert signs.mean(0).abs().max() < 0.08
    # places and samples are independent of each other
    assert (signs.T @ signs / 4000 - torch.eye(6)).abs().max() < 0.08
    assert (signs[1:] * signs[:-1]).mean().abs() < 0.05


def test_of_scores_the_likely_classes_count_and_a_shift_does_not() -> None:
    scores = torch.tensor([[4.0, 1.0, -2.0]]).expand(20_000, 3)
    signs = random_signs((torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)),), scores.shape)
    projection = score_signs(signs, scores)
    torch.testing.assert_close(projection.sum(1), torch.zeros(20_000), rtol=0, atol=1e-6)
    share = (scores[0].softmax(0) + 1 / 3) / 2
    for change in torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.3, 0.3, 0.3], [-1.0, 2.0, 0.5]]):
        variance = float((share * change.square()).sum() - (share * change).sum() ** 2)
        assert float((projection @ change).square().mean()) == pytest.approx(variance, rel=0.05, abs=1e-7)


def test_the_mean_square_is_that_of_the_jacobian() -> None:
    """E (r J d)^2 = |J d|^2, for the input of a linear model, where first order is all there is."""
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    x = torch.randn(5000, 9, generator=torch.Generator().manual_seed(3))
    change = torch.randn(5000, 9, generator=torch.Generator().manual_seed(4))
    estimate = (random_signs((x,), torch.Size((5000, 4))) @ weight * change).sum(1).square().mean()
    assert estimate == pytest.approx(float((change @ weight.T).square().sum(1).mean()), rel=0.05)


def test_the_chosen_range_has_nearly_the_least_error_of_the_outputs() -> None:
    qmodel, x = prepared(), images()
    qat.calibrate(qmodel, [x])
    torch.manual_seed(0)
    net = Net().eval()
    for name in ("x", "conv"):
        quantizer = qmodel.activation_quantizers()[name]
        assert isinstance(quantizer.observer, AutoObserver)
        with torch.no_grad():
            value = x if name == "x" else net.conv(x)
        rest = (lambda v: tail(net, net.conv(v))) if name == "x" else (lambda v: tail(net, v))
        errors = {}
        for method, bounds in quantizer.observer.candidates(quantizer.scheme).items():
            grid = numerics.range_to_scale(*bounds, quantizer.scheme)
            codes = numerics.quantize(value, *grid, *quantizer.scheme.code_range)
            with torch.no_grad():
                errors[method] = float((rest(numerics.dequantize(codes, *grid)) - rest(value)).square().sum())
        chosen = errors[qmodel.encodings()[name].method]
        assert chosen < 1.6 * min(errors.values()), (name, errors)
        assert max(errors.values()) > 3 * chosen, "the candidates do not differ"


def tail(net: Net, y: Tensor) -> Tensor:
    out: Tensor = net.head(F.relu(net.side(y) + y).mean((2, 3)))
    return out


def test_batches_do_not_matter() -> None:
    x = images()
    one, many = prepared(), prepared()
    qat.calibrate(one, [x])
    qat.calibrate(many, list(x.split(7)))
    assert {n: e.method for n, e in one.encodings().items()} == {n: e.method for n, e in many.encodings().items()}


def test_outputs_without_gradients_leave_the_range_of_least_error() -> None:
    class Classes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    torch.manual_seed(0)
    scheme = {"activations": {"observer": "auto"}}
    target = qat.load_target("onnxruntime-cpu")
    qmodel = qat.prepare(Classes().eval(), images()[:2], target=target, scheme=scheme)
    qat.calibrate(qmodel, [images()])
    usual = prepared("histogram")
    qat.calibrate(usual, [images()])
    assert qmodel.encodings()["conv"].scale == pytest.approx(usual.encodings()["conv"].scale, rel=0.05)
