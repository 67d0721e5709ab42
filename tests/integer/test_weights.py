"""Weights and biases as integers, batch norm folded in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from whole_networks import Fn, conv, prepared, take

import qat
from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.weights import Affine, quantize_affine, storage
from qat.scheme import Granularity, Scheme

PER_CHANNEL = Scheme(dtype="int8", symmetric=True, granularity=Granularity("per_channel", 0), qmin=-127)
INPUT = Encoding("uint8", (0.02,), (128,), 0, 255)
OUTPUT = Encoding("uint8", (0.4,), (128,), 0, 255)


def affine(weight: torch.Tensor, bias: torch.Tensor | None) -> Affine:
    return Affine(weight, None if bias is None else bias.double(), 0, None, weight)


def test_a_bias_has_the_scale_of_the_products() -> None:
    given = affine(torch.randn(4, 8), torch.randn(4))
    weight, bias = quantize_affine("l", ("w", "b"), given, PER_CHANNEL, INPUT, OUTPUT)
    assert bias is not None
    assert bias.encoding is not None
    assert weight.encoding is not None
    want = torch.tensor(0.02) * weight.encoding.scale_tensor
    assert torch.equal(bias.encoding.scale_tensor, want)
    assert bias.value.dtype == torch.int32
    assert set(bias.encoding.zero_point) == {0}


def test_a_bias_is_rounded_to_the_nearest_step() -> None:
    values = torch.tensor([0.3, -0.7, 0.0, 12.0])
    _, bias = quantize_affine("l", ("w", "b"), affine(torch.randn(4, 8), values), PER_CHANNEL, INPUT, OUTPUT)
    assert bias is not None
    assert bias.encoding is not None
    steps = torch.tensor(bias.encoding.scale)
    assert bool(((bias.encoding.dequantize(bias.value) - values).abs() <= steps * 0.501).all())


def test_without_a_bias_there_is_none() -> None:
    assert quantize_affine("l", ("w", "b"), affine(torch.randn(4, 8), None), PER_CHANNEL, INPUT, OUTPUT)[1] is None


@pytest.mark.parametrize("granularity", [Granularity("per_channel", 0), Granularity()], ids=["channel", "tensor"])
def test_a_bias_beyond_its_range_makes_the_weight_scale_coarser(granularity: Granularity) -> None:
    weights = torch.randn(3, 8)
    weights[1] *= 1e-12
    if granularity.kind == "per_tensor":
        weights *= 1e-12
    values = torch.tensor([0.5, 40.0, -0.5])
    scheme = PER_CHANNEL.with_(granularity=granularity)
    plain = Encoding.from_range(-weights.abs().amax(1), weights.abs().amax(1), PER_CHANNEL)
    weight, bias = quantize_affine("l", ("w", "b"), affine(weights, values), scheme, INPUT, OUTPUT)
    assert bias is not None
    assert bias.encoding is not None
    assert weight.encoding is not None
    assert int(bias.value.abs().max()) <= 2**30
    assert bool(((bias.encoding.dequantize(bias.value) - values).abs() <= bias.encoding.scale_tensor).all())
    if granularity.kind == "per_channel":
        # the other channels are left alone
        assert weight.encoding.scale[0] == plain.scale[0]
        assert weight.encoding.scale[1] > plain.scale[1]


FOUR = PER_CHANNEL.with_(dtype="int4", qmin=-7)
X4, Y4 = Encoding("uint4", (0.3,), (0,), 0, 15), Encoding("uint4", (0.33,), (0,), 0, 15)


def test_the_bias_of_a_dead_channel_is_not_rounded_away() -> None:
    """A variance of next to nothing makes folded weights of hundreds, and steps of the bias beyond all results."""
    weights = torch.rand(4, 9) + 0.2
    weights[2] *= 300.0
    values = torch.tensor([0.4, 0.5, 0.41, 0.3])
    plain = Encoding.from_range(-weights.amax(1), weights.amax(1), FOUR)
    weight, bias = quantize_affine("l", ("w", "b"), affine(weights, values), FOUR, X4, Y4)
    assert bias is not None
    assert bias.encoding is not None
    assert weight.encoding is not None
    assert plain.scale[2] * X4.scale[0] > 10 * Y4.scale[0]
    found = bias.encoding.dequantize(bias.value)
    assert float((found - values).abs()[2]) < 0.02 * Y4.scale[0]
    assert weight.encoding.scale[:2] == plain.scale[:2]
    # the weights of that channel are as large as can be, and a full input still moves the result by more than it holds
    assert torch.equal(weight.value[2].int(), torch.full((9,), 7, dtype=torch.int32))
    assert 15 * X4.scale[0] * 9 * 7 * weight.encoding.scale[2] > 15 * Y4.scale[0]


@pytest.mark.parametrize("bias", [200.0, -200.0])
def test_large_weights_that_make_up_for_a_large_bias_are_left_alone(bias: float) -> None:
    weights = torch.rand(2, 9) + 0.2
    weights[1] *= 300.0
    plain = Encoding.from_range(-weights.amax(1), weights.amax(1), FOUR)
    weight, _ = quantize_affine("l", ("w", "b"), affine(weights, torch.tensor([0.1, bias])), FOUR, X4, Y4)
    assert weight.encoding is not None
    assert weight.encoding.scale == plain.scale


@pytest.mark.parametrize("bits", [4, 8])
def test_a_channel_that_never_moves_has_its_constant(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        # the fourth channel is always zero before the depthwise layer, whose batch norm has seen no variance in it
        model[1].bias[3] = -60.0
        model[4].running_var[3] = 0.0
        model[4].bias[3] = 0.4
    images = torch.randn(64, 3, 8, 8)
    scheme = {"weights": {"dtype": "int4"}, "activations": {"qmin": 0, "qmax": 15}} if bits == 4 else None
    qmodel = qat.prepare(model, images, target=qat.load_target("onnxruntime-cpu"), scheme=scheme)
    qat.calibrate(qmodel, [images], progress=False)
    imodel = qat.convert(qmodel)
    encoding = qmodel.encodings()["5"]
    codes = imodel.run((images,), collect=["5"])["5"][:, 3]
    want = int(encoding.quantize(torch.tensor(0.4)))
    if bits == 4:
        assert abs(0.4 / encoding.scale[0] - round(0.4 / encoding.scale[0])) < 0.45, "a tie would show nothing"
    # at 8 bits a bias may be rounded by as much as a step of the result
    assert int((codes - want).abs().max()) <= (0 if bits == 4 else 1)


def test_tiny_weights_under_a_large_bias_still_give_the_right_result() -> None:
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[2] *= 1e-13
        layer.bias[2] = 30.0
    whole = take(nn.Sequential(layer, nn.ReLU()), torch.randn(6, 8))
    assert float((whole.outputs()[0][:, 2] - 30.0).abs().max()) < 0.1
    assert int(whole.program.constants["0.bias"].value.abs().max()) <= 2**30


def test_dead_channels_give_their_bias() -> None:
    """A batch norm with factor zero (as pruning leaves them) makes the weight vanish against the bias."""

    class Dead(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            with torch.no_grad():
                self[1].weight[1] = 0.0
                self[1].bias[1] = 0.8
            return super().train(mode)

    whole = take(Dead(conv(), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(3, 4, 6, 6))
    assert float((whole.outputs()[0][:, 1] - 0.8).abs().max()) < 0.02


def test_an_infinite_folded_bias_is_refused_by_name() -> None:
    qmodel = prepared(nn.Sequential(conv(), nn.BatchNorm2d(4)), torch.randn(3, 4, 6, 6))
    with torch.no_grad():
        qmodel.get_submodule("1").bias[0] = torch.inf
    with pytest.raises(ExportError, match=r"0: its bias with batch norm folded in is not finite"):
        qat.convert(qmodel)


def test_an_accumulator_that_may_overflow_stops_the_export(tmp_path: Path) -> None:
    layer = nn.Linear(70_000, 2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    # zero point 0, so that 70 000 * 255 * 127 is what may be summed
    qmodel = prepared(Fn(lambda m, x: m.big(x), big=layer), torch.rand(3, 70_000))
    with pytest.raises(ExportError, match=r"'big': the accumulator of output channel 0 may reach 2266950000"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_training_and_folding_see_one_weight() -> None:
    """What the convolution saw in training, times the batch norm's factor, is what the codes say."""
    x = torch.randn(3, 4, 6, 6)
    qmodel = prepared(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), x)
    constant = qat.convert(qmodel).program.constants["0.weight"]
    assert constant.encoding is not None
    norm = qmodel.get_submodule("1")
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).reshape(-1, 1, 1, 1)
    seen = qmodel.get_submodule("0").weight
    assert torch.allclose(seen * factor, constant.encoding.dequantize(constant.value), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("int4", torch.int8),
        ("uint4", torch.uint8),
        ("int8", torch.int8),
        ("uint8", torch.uint8),
        ("int16", torch.int16),
        ("uint16", torch.int32),
        ("int32", torch.int32),
    ],
)
def test_codes_are_stored_in_a_type_that_holds_them(dtype: str, stored: torch.dtype) -> None:
    from qat.scheme import int_type

    ends = torch.tensor([int_type(dtype).qmin, int_type(dtype).qmax])
    assert storage(ends, dtype).dtype == stored
    assert torch.equal(storage(ends, dtype).to(torch.int64), ends)
