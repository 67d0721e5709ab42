"""Convolutions, linear layers and arithmetic with what may follow them: equal codes in ONNX Runtime, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, Whole, conv, take

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "prelu": lambda: nn.PReLU(6),
    "prelu_shared": nn.PReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
    "none": nn.Identity,
}
CONVS: dict[str, Callable[..., nn.Module]] = {
    "conv1": nn.Conv1d,
    "conv2": nn.Conv2d,
    "conv3": nn.Conv3d,
    "transpose1": nn.ConvTranspose1d,
    "transpose2": nn.ConvTranspose2d,
    "transpose3": nn.ConvTranspose3d,
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Branches(nn.Module):
    """One layer, one batch norm and one activation for each name, side by side."""

    def __init__(self, make: Callable[[], nn.Module], names: list[str]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.Sequential(make(), ACTIVATIONS[name]()) for name in names})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: branch(x) for name, branch in self.branches.items()}


def normed(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(CONVS[kind](4, 6, 3, padding=1, stride=2, **options), NORMS[int(kind[-1])](6))


@pytest.mark.parametrize("kind", ["conv2", "transpose2"])
def test_a_convolution_with_batch_norm_and_every_activation(kind: str) -> None:
    # ONNX Runtime computes a transposed convolution in float: here and there a sum is at a tie
    bound = 1 if kind == "transpose2" else 0
    whole = take(Branches(normed(kind, bias=False), list(ACTIVATIONS)), torch.randn(3, 4, 9, 9), bound=bound)
    assert all(tensor.unequal_share < 1e-3 for tensor in whole.verification.tensors)
    assert "batch_norm" not in whole.kinds()
    assert whole.kinds().count(kind.replace("2", "").replace("transpose", "conv_transpose")) == len(ACTIVATIONS)


@pytest.mark.parametrize("kind", ["conv1", "conv3", "transpose1", "transpose3"])
def test_the_other_dimensions(kind: str) -> None:
    size = (7,) * int(kind[-1]) if kind[-1] == "1" else (4, 5, 3)
    take(Branches(normed(kind), ["relu", "hardswish", "prelu", "none"]), torch.randn(3, 4, *size))


def test_a_linear_layer_with_batch_norm_and_every_activation() -> None:
    model = Branches(lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)), list(ACTIVATIONS))
    whole = take(model, torch.randn(5, 8))
    assert "batch_norm" not in whole.kinds()


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (3, 2, 5, 8)], ids=str)
def test_linear_layers_on_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    take(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3, bias=False), nn.ReLU()), torch.randn(shape))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=(2, 1), groups=4),
        lambda: nn.Conv2d(4, 8, (3, 1), stride=(1, 2), groups=2, bias=False),
        lambda: nn.Conv2d(4, 8, 4, padding="same"),
        lambda: nn.ConvTranspose2d(4, 8, 4, 2, 1, groups=2),
        lambda: nn.ConvTranspose2d(4, 8, 3, 3, 2, output_padding=2, dilation=2, bias=False),
    ],
    ids=["depthwise", "grouped", "same", "transposed_grouped", "transposed_dilated"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_unusual_convolutions(layer: Callable[[], nn.Module]) -> None:
    take(nn.Sequential(layer(), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 4)), torch.randn(3, 4, 9, 9))


# arithmetic ---------------------------------------------------------------------------------------------------------

OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}


def divisor(operation: str, x: Tensor) -> Tensor:
    return F.relu(x) + 0.7 if operation == "div" else x


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_two_tensors_with_activation(operation: str) -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        result = OPERATIONS[operation](m.a(x), divisor(operation, m.b(x)))
        # each activation gets a result of its own, or nothing could be fused
        again = [OPERATIONS[operation](m.b(x), divisor(operation, m.a(x))) for _ in range(4)]
        return [result, F.relu(again[0]), F.relu6(again[1]), F.hardswish(again[2]), F.silu(again[3])]

    take(Fn(forward, a=conv(), b=conv()), torch.randn(3, 4, 6, 6))


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_two_tensors_that_broadcast(operation: str) -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        a, b = m.a(x), m.b(x)
        small = [b.mean((2, 3), keepdim=True), b[:, :1, :1], b[..., :1], b[:, :1, :1, :1], b[0:, 0]]
        small[-1] = small[-1].unsqueeze(1)
        run = OPERATIONS[operation]
        return [
            *[run(a, divisor(operation, part)) for part in small],
            *[run(part, divisor(operation, a)) for part in small],
        ]

    take(Fn(forward, a=conv(), b=conv()), torch.randn(3, 4, 6, 7), steps=3)


@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 6, 7), (), (7,), (1,)], ids=str)
def test_a_constant_on_either_side(operation: str, shape: tuple[int, ...]) -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        run, a = OPERATIONS[operation], m.a(x - m.mean)
        return [run(a, m.p), run(m.p, a.abs() + 1)]

    model = Fn(forward, a=conv(), p=nn.Parameter(torch.rand(shape) + 0.5), mean=torch.rand(1, 4, 1, 1))
    take(model, torch.randn(3, 4, 6, 7), steps=3)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "plus": lambda x: x + 0.3,
    "plus_integer": lambda x: 1 + x,
    "minus": lambda x: x - 1,
    "from": lambda x: 2.0 - x,
    "times": lambda x: x * 0.37,
    "times_negative": lambda x: x * -0.37,
    "over": lambda x: x / 3,
    "under": lambda x: 1.5 / (F.relu(x) + 1),
    "negative": lambda x: -x,
    "nothing": lambda x: x + 0,
    "zero": lambda x: x * 0.0 + x,
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "power": lambda x: x**2,
    "cube": lambda x: x.pow(3.0),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "abs": torch.abs,
    "exp": torch.exp,
    "log": lambda x: (x.abs() + 1).log(),
    "rsqrt": lambda x: (x.abs() + 1).rsqrt(),
    "square": torch.square,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "reciprocal": lambda x: (x.abs() + 1).reciprocal(),
    "at_least": lambda x: x.clamp(min=-0.3),
    "at_most": lambda x: x.clamp(max=0.3),
}


@pytest.mark.parametrize("table", [NUMBERS, FUNCTIONS], ids=["numbers", "functions"])
def test_numbers_and_functions(table: dict[str, Callable[[Tensor], Tensor]]) -> None:
    convs = {f"c{i}": conv() for i in range(len(table))}

    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.last(f(getattr(m, f"c{i}")(x))) for i, f in enumerate(table.values())]

    take(Fn(forward, last=conv(), **convs), torch.randn(3, 4, 6, 6), steps=3)


def test_a_clamp_where_the_zero_point_is_not_the_smallest_code() -> None:
    """A range that includes negative numbers makes a ReLU an operator; one that does not makes it nothing."""

    def forward(m: Fn, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(F.relu(y)) + m.c(y)

    whole = take(Fn(forward, a=conv(), b=conv(), c=conv()), torch.randn(3, 4, 6, 6))
    assert "clamp" in whole.kinds()
    redundant = take(nn.Sequential(conv(), nn.ReLU(), conv()), torch.randn(3, 4, 6, 6))
    assert "clamp" not in redundant.kinds()


@pytest.mark.parametrize(
    "after",
    [
        lambda x: F.relu(F.relu(x)),
        lambda x: F.relu(F.relu6(x * 3)),
        lambda x: F.relu(F.max_pool2d(x, 2)),
        lambda x: F.relu(torch.cat([x, x * 0.5], 1)),
        lambda x: F.relu(x * 0.5),
        lambda x: F.relu(F.avg_pool2d(x, 2)),
        lambda x: F.relu(x.mean((2, 3))),
        lambda x: F.relu(x @ x.mT),
    ],
    ids=["relu", "relu6", "max_pool", "concat", "rescale", "avg_pool", "mean", "matmul"],
)
def test_a_clamp_after_anything(after: Callable[[Tensor], Tensor]) -> None:
    whole: Whole = take(Fn(lambda m, x: after(m.a(x)), a=conv()), torch.randn(3, 4, 6, 6))
    assert all(float(y.min()) >= 0 for y in whole.outputs())
