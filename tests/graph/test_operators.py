"""Calls that compute: their kinds and attributes, and that these alone reproduce the model's output."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from operator_reference import IMAGE, TOKENS, Call, check, operators_of
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9), {"stride": (2,), "padding": ((1, 1),), "groups": 1}),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False), IMAGE, {"dilation": (2, 2), "padding": ((0, 0), (0, 0))}),
        (nn.Conv2d(4, 8, 3, padding=(1, 2), groups=4), IMAGE, {"groups": 4, "padding": ((1, 1), (2, 2))}),
        (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), IMAGE, {"padding": ((1, 2), (2, 2))}),
        (nn.Conv2d(4, 6, 3, padding="valid"), IMAGE, {"padding": ((0, 0), (0, 0))}),
        (nn.Conv3d(2, 3, 2, padding=1), (2, 4, 4, 4), {"padding": ((1, 1),) * 3}),
        (
            Call(lambda x, w, b: F.conv2d(x, w, b, 2, 1), torch.randn(6, 4, 3, 3), torch.randn(6)),
            IMAGE,
            {"stride": (2, 2)},
        ),
        (Call(lambda x, w: torch.conv1d(x, w, padding="same"), torch.randn(6, 4, 4)), (4, 9), {"padding": ((1, 2),)}),
    ],
)
def test_convolutions(model, shape, attrs):
    op = check(model, shape, "conv", **attrs)
    weight = next(p for p in model.parameters() if p.ndim > 1)
    assert op.macs == model(torch.zeros(1, *shape)).numel() * weight[0].numel()


class ToSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(x, output_size=(16, 11))


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 9), {"stride": (2,), "output_padding": (0,)}),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            IMAGE,
            {"output_padding": (1, 1), "padding": ((1, 1), (1, 1)), "groups": 2},
        ),
        (nn.ConvTranspose3d(2, 3, 2, dilation=2, bias=False), (2, 3, 3, 3), {"dilation": (2, 2, 2)}),
        (ToSize(), IMAGE, {"output_padding": (1, 0)}),
        (
            Call(
                lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2), torch.randn(4, 3, 2, 2), torch.randn(6)
            ),
            IMAGE,
            {"groups": 2},
        ),
    ],
)
def test_transposed_convolutions(model, shape, attrs):
    op = check(model, shape, "conv_transpose", **attrs)
    weight = next(p for p in model.parameters() if p.ndim > 1)
    assert op.macs == torch.Size(shape).numel() * weight[0].numel()


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(8, 3),
        nn.Linear(8, 3, bias=False),
        Call(F.linear, torch.randn(3, 8), torch.randn(3)),
        Call(F.linear, torch.randn(3, 8)),
    ],
)
def test_linear(model):
    op = check(model, TOKENS, "linear")
    assert op.macs == 5 * 3 * 8
    assert (op.inputs[2] is None) == (len(list(model.parameters())) == 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.matmul(x, x.transpose(1, 2)),
        lambda x: x @ x.mT,
        lambda x: x.matmul(x.transpose(-1, -2)),
        lambda x: torch.bmm(x, x.swapaxes(1, 2)),
        lambda x: x.bmm(x.permute(0, 2, 1)),
        lambda x: torch.einsum("bij, bjk -> bik", x, x.transpose(1, 2)),
        lambda x: torch.einsum("bij,bjk->bik", [x, x.transpose(1, 2)]),
    ],
)
def test_matrix_products(function):
    check(function, TOKENS, "transpose matmul", perm=(0, 2, 1))
    product = operators_of(Call(function), torch.randn(2, *TOKENS))[-1]
    assert product.macs == 5 * 8 * 5
    assert product.attrs == {}


def test_matrix_product_with_a_parameter():
    op = check(Call(lambda x, w: x @ w, torch.randn(8, 3)), TOKENS, "matmul")
    assert op.inputs[1].key == "a"
    assert op.macs == 5 * 8 * 3


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.BatchNorm1d(8), (8,)),
        (nn.BatchNorm2d(4, eps=1e-3), IMAGE),
        (nn.BatchNorm2d(4, affine=False), IMAGE),
        (nn.BatchNorm3d(4), (4, 2, 2, 2)),
        (nn.SyncBatchNorm(4), IMAGE),
    ],
)
def test_batch_norm(model, shape):
    op = check(model, shape, "batch_norm", eps=model.eps)
    assert [i and i.key for i in op.inputs[1:]] == [
        *(("0.weight", "0.bias") if model.affine else (None, None)),
        "0.running_mean",
        "0.running_var",
    ]


@pytest.mark.parametrize(
    ("model", "axes_count"),
    [
        (nn.LayerNorm(8, eps=1e-6), 1),
        (nn.LayerNorm((5, 8), elementwise_affine=False), 2),
        (nn.LayerNorm(8, bias=False), 1),
        (Call(lambda x, w, b: F.layer_norm(x, (8,), w, b), torch.ones(8), torch.ones(8)), 1),
        (Call(lambda x: torch.layer_norm(x, (5, 8))), 2),
    ],
)
def test_layer_norm(model, axes_count):
    check(model, TOKENS, "layer_norm", axes_count=axes_count, eps=getattr(model, "eps", 1e-5))


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        (nn.ReLU(), 0.0, None),
        (nn.ReLU(inplace=True), 0.0, None),
        (F.relu, 0.0, None),
        (torch.relu, 0.0, None),
        (lambda x: x.relu(), 0.0, None),
        (lambda x: x.relu_(), 0.0, None),
        (lambda x: torch.relu_(x), 0.0, None),
        (lambda x: F.relu(input=x, inplace=True), 0.0, None),
        (nn.ReLU6(), 0.0, 6.0),
        (F.relu6, 0.0, 6.0),
        (nn.Hardtanh(-0.5, 0.25), -0.5, 0.25),
        (F.hardtanh, -1.0, 1.0),
        (nn.Threshold(0.5, 0.5), 0.5, None),
        (lambda x: torch.clamp(x, 0, 1), 0.0, 1.0),
        (lambda x: torch.clip(x, max=1), None, 1.0),
        (lambda x: x.clamp(min=-0.5), -0.5, None),
        (lambda x: x.clamp_(-0.5, 0.5), -0.5, 0.5),
        (lambda x: x.clip(0.0, 1.0), 0.0, 1.0),
        (lambda x: x.clamp_min(0.1), 0.1, None),
        (lambda x: torch.clamp_max(x, 0.1), None, 0.1),
    ],
)
def test_clamps(model, low, high):
    check(model, IMAGE, "clamp", low=low, high=high)


@pytest.mark.parametrize(
    ("model", "function", "params"),
    [
        (nn.Sigmoid(), "sigmoid", {}),
        (torch.sigmoid, "sigmoid", {}),
        (F.sigmoid, "sigmoid", {}),
        (lambda x: x.sigmoid(), "sigmoid", {}),
        (nn.Tanh(), "tanh", {}),
        (torch.tanh, "tanh", {}),
        (lambda x: x.tanh_(), "tanh", {}),
        (nn.Hardsigmoid(), "hardsigmoid", {}),
        (F.hardsigmoid, "hardsigmoid", {}),
        (nn.Hardswish(inplace=True), "hardswish", {}),
        (F.hardswish, "hardswish", {}),
        (nn.SiLU(), "silu", {}),
        (F.silu, "silu", {}),
        (nn.Mish(), "mish", {}),
        (F.mish, "mish", {}),
        (nn.GELU(), "gelu", {"approximate": "none"}),
        (nn.GELU("tanh"), "gelu", {"approximate": "tanh"}),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu", {"approximate": "tanh"}),
        (nn.LeakyReLU(0.2), "leaky_relu", {"negative_slope": 0.2}),
        (F.leaky_relu, "leaky_relu", {"negative_slope": 0.01}),
        (nn.RReLU(0.1, 0.3), "leaky_relu", {"negative_slope": 0.2}),
        (nn.ELU(0.5), "elu", {"alpha": 0.5}),
        (lambda x: F.elu(x, 0.5), "elu", {"alpha": 0.5}),
        (nn.CELU(), "elu", {"alpha": 1.0}),
        (nn.Softplus(), "softplus", {}),
        (F.softplus, "softplus", {}),
        (torch.exp, "exp", {}),
        (lambda x: x.exp(), "exp", {}),
        (abs, "abs", {}),
        (torch.abs, "abs", {}),
        (operator.neg, "neg", {}),
        (lambda x: x * -1, "neg", {}),
        (lambda x: 0 - x, "neg", {}),
        (lambda x: x.erf(), "erf", {}),
        (torch.sin, "sin", {}),
        (lambda x: x.cos(), "cos", {}),
        (lambda x: x**2, "pow", {"exponent": 2.0}),
        (torch.square, "pow", {"exponent": 2.0}),
        (lambda x: torch.pow(x, 3), "pow", {"exponent": 3.0}),
    ],
)
def test_tables(model, function, params):
    op = check(model, IMAGE, "table", function=function)
    assert op.attrs["params"] == pytest.approx(params) if "negative_slope" in params else op.attrs["params"] == params


@pytest.mark.parametrize(
    ("model", "function"),
    [
        (torch.log, "log"),
        (lambda x: x.sqrt(), "sqrt"),
        (torch.rsqrt, "rsqrt"),
        (torch.reciprocal, "reciprocal"),
        (lambda x: 1.0 / x, "reciprocal"),
        (lambda x: x**-0.5, "pow"),
    ],
)
def test_tables_of_positive_values(model, function):
    check(model, IMAGE, "table positive", function=function)


@pytest.mark.parametrize(
    "model", [nn.PReLU(), nn.PReLU(4), Call(F.prelu, torch.rand(4)), Call(lambda x, a: x.prelu(a), torch.rand(1))]
)
def test_prelu(model):
    op = check(model, IMAGE, "prelu")
    assert op.inputs[1].key in ("0.weight", "a")


@pytest.mark.parametrize(
    ("model", "shape", "axis"),
    [
        (nn.Softmax(dim=-1), TOKENS, 2),
        (nn.Softmax(dim=1), TOKENS, 1),
        (nn.Softmax2d(), IMAGE, 1),
        (lambda x: F.softmax(x, -2), TOKENS, 1),
        (lambda x: torch.softmax(x, dim=2), TOKENS, 2),
        (lambda x: x.softmax(-1), TOKENS, 2),
        (lambda x: F.softmax(x, dim=1, dtype=torch.float32), TOKENS, 1),
    ],
)
def test_softmax(model, shape, axis):
    check(model, shape, "softmax", axis=axis)


def shifted(x: Tensor) -> Tensor:
    return torch.flip(x, (2,))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x + shifted(x), "add"),
        (lambda x: torch.add(shifted(x), x), "add"),
        (lambda x: shifted(x).add_(x), "add"),
        (lambda x: operator.iadd(shifted(x), x), "add"),
        (lambda x: x - shifted(x), "sub"),
        (lambda x: torch.sub(x, shifted(x)), "sub"),
        (lambda x: torch.rsub(x, shifted(x)), "sub"),
        (lambda x: x * shifted(x), "mul"),
        (lambda x: x.mul(shifted(x)), "mul"),
        (lambda x: x / shifted(x), "div"),
        (lambda x: torch.div(x, other=shifted(x)), "div"),
    ],
)
def test_two_tensors(function, kind):
    check(function, IMAGE, f"slice {kind}")


@pytest.mark.parametrize(
    ("function", "kind", "scalar"),
    [
        (lambda x: x + 2, "add", 2.0),
        (lambda x: 2 + x, "add", 2.0),
        (lambda x: x - 0.5, "sub", 0.5),
        (lambda x: x.sub(0.5), "sub", 0.5),
        (lambda x: 0.5 - x, "sub", 0.5),
        (lambda x: torch.rsub(x, 0.5), "sub", 0.5),
        (lambda x: x * -3, "mul", -3.0),
        (lambda x: x / -4, "mul", -0.25),
        (lambda x: 2 / x, "div", 2.0),
    ],
)
def test_a_tensor_and_a_number(function, kind, scalar):
    op = check(function, IMAGE, kind)
    assert scalar in [getattr(i, "value", None) for i in op.inputs]


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda x: x * 2, 2.0),
        (lambda x: 0.5 * x, 0.5),
        (lambda x: torch.mul(x, 3), 3.0),
        (lambda x: x / 4, 0.25),
        (lambda x: x.div_(8), 0.125),
        (lambda x: x * x.shape[1], 4.0),
    ],
)
def test_positive_factors_only_rescale(function, factor):
    op = operators_of(Call(function), torch.randn(2, *IMAGE))[-1]
    assert (op.kind, op.attrs) == ("rescale", {"factor": factor})
    check(function, IMAGE, "rescale", factor=factor)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, a: x + a, "add"),
        (lambda x, a: a + x, "add"),
        (lambda x, a: x - a, "sub"),
        (lambda x, a: x.mul(a), "mul"),
        (lambda x, a: a / x, "div"),
    ],
)
def test_a_tensor_and_a_parameter(function, kind):
    op = check(Call(function, torch.rand(4, 1, 1) + 0.5), IMAGE, kind)
    assert "a" in [getattr(i, "key", None) for i in op.inputs]


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (nn.MaxPool1d(2), (4, 9), {"kernel": (2,), "stride": (2,)}),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE, {"padding": ((1, 1), (1, 1)), "ceil_mode": True}),
        (nn.MaxPool2d((2, 3), stride=1, dilation=(2, 1)), IMAGE, {"kernel": (2, 3), "dilation": (2, 1)}),
        (nn.MaxPool3d(2), (2, 4, 4, 4), {"stride": (2, 2, 2)}),
        (lambda x: F.max_pool2d(x, 2), IMAGE, {"stride": (2, 2), "padding": ((0, 0), (0, 0))}),
        (lambda x: F.max_pool2d(x, kernel_size=3, stride=(1, 2), padding=1), IMAGE, {"stride": (1, 2)}),
        (lambda x: torch.max_pool1d(x, 3, 1), (4, 9), {"stride": (1,)}),
        (nn.AdaptiveMaxPool2d(1), IMAGE, {"kernel": (8, 6)}),
        (nn.AdaptiveMaxPool2d((4, None)), IMAGE, {"kernel": (2, 1), "stride": (2, 1)}),
        (lambda x: F.adaptive_max_pool1d(x, 3), (4, 9), {"kernel": (3,)}),
    ],
)
def test_max_pooling(model, shape, attrs):
    check(model, shape, "max_pool", **attrs)


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (nn.AvgPool1d(2), (4, 9), {"kernel": (2,), "stride": (2,), "count_include_pad": True}),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE, {"padding": ((1, 1), (1, 1)), "ceil_mode": True}),
        (nn.AvgPool2d(3, 1, padding=(1, 0), count_include_pad=False), IMAGE, {"count_include_pad": False}),
        (nn.AvgPool3d(2), (2, 4, 4, 4), {"stride": (2, 2, 2)}),
        (lambda x: F.avg_pool2d(x, (2, 3)), IMAGE, {"stride": (2, 3)}),
        (lambda x: F.avg_pool1d(x, 3, 1, 1, False, False), (4, 9), {"count_include_pad": False}),
        (nn.AdaptiveAvgPool2d((4, 2)), IMAGE, {"kernel": (2, 3), "stride": (2, 3)}),
        (lambda x: F.adaptive_avg_pool2d(x, (2, None)), IMAGE, {"kernel": (4, 1)}),
        (lambda x: F.interpolate(x, size=(4, 3), mode="area"), IMAGE, {"kernel": (2, 2)}),
    ],
)
def test_average_pooling(model, shape, attrs):
    check(model, shape, "avg_pool", **attrs)


@pytest.mark.parametrize(
    ("model", "shape", "axes", "keepdims"),
    [
        (nn.AdaptiveAvgPool1d(1), (4, 9), (2,), True),
        (nn.AdaptiveAvgPool2d(1), IMAGE, (2, 3), True),
        (nn.AdaptiveAvgPool2d((1, None)), IMAGE, (2,), True),
        (nn.AdaptiveAvgPool3d((1, 1, 1)), (2, 3, 4, 5), (2, 3, 4), True),
        (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE, (2, 3), True),
        (lambda x: x.mean([2, 3]), IMAGE, (2, 3), False),
        (lambda x: x.mean((-1, -2), keepdim=True), IMAGE, (2, 3), True),
        (lambda x: torch.mean(x, dim=1), IMAGE, (1,), False),
        (lambda x: x.mean(axis=-1, keepdims=True), IMAGE, (3,), True),
    ],
)
def test_means(model, shape, axes, keepdims):
    check(model, shape, "mean", axes=axes, keepdims=keepdims)


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (nn.Upsample(scale_factor=2), IMAGE, {"mode": "nearest", "size": (16, 12), "scales": (2.0, 2.0)}),
        (
            nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True),
            IMAGE,
            {"mode": "linear", "size": (5, 7), "scales": None, "align_corners": True},
        ),
        (nn.UpsamplingNearest2d(size=(9, 9)), IMAGE, {"mode": "nearest", "align_corners": False}),
        (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE, {"mode": "linear", "align_corners": True}),
        (lambda x: F.interpolate(x, scale_factor=1.7), IMAGE, {"scales": (1.7, 1.7), "size": (13, 10)}),
        (
            lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
            IMAGE,
            {"scales": None, "size": (13, 10)},
        ),
        (lambda x: F.interpolate(x, size=20, mode="linear"), (4, 9), {"mode": "linear", "size": (20,)}),
        (
            lambda x: F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"),
            (2, 3, 4, 5),
            {"scales": (1.0, 2.0, 2.0)},
        ),
        (nn.AdaptiveAvgPool2d((16, 12)), IMAGE, {"mode": "nearest", "size": (16, 12), "scales": None}),
    ],
)
def test_resizing(model, shape, attrs):
    check(model, shape, "resize", **attrs)


@pytest.mark.parametrize(
    ("model", "shape", "attrs"),
    [
        (
            nn.ZeroPad2d((1, 2, 3, 4)),
            IMAGE,
            {"pads": ((0, 0), (0, 0), (3, 4), (1, 2)), "mode": "constant", "value": 0.0},
        ),
        (nn.ConstantPad1d(2, 0.5), (4, 9), {"pads": ((0, 0), (0, 0), (2, 2)), "value": 0.5}),
        (nn.ReflectionPad2d(1), IMAGE, {"mode": "reflect"}),
        (nn.ReplicationPad2d((1, 0, 0, 2)), IMAGE, {"mode": "replicate", "pads": ((0, 0), (0, 0), (0, 2), (1, 0))}),
        (lambda x: F.pad(x, (0, 0, 1, 2)), TOKENS, {"pads": ((0, 0), (1, 2), (0, 0))}),
        (lambda x: F.pad(x, [1, 1], mode="reflect"), (4, 9), {"mode": "reflect"}),
        (lambda x: F.pad(x, (1, 1), value=-1.0), IMAGE, {"value": -1.0}),
    ],
)
def test_padding(model, shape, attrs):
    check(model, shape, "pad", **attrs)


def test_negative_padding_is_a_slice_and_none_is_nothing():
    check(lambda x: F.pad(x, (-1, -2)), IMAGE, "slice", axes=(3,), starts=(1,), ends=(4,))
    check(lambda x: F.pad(x, (0, 0)), IMAGE, "identity")
