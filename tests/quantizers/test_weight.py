"""The weight parametrization: grids, batch-norm scaling, codes, copies and state."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.encoding import Encoding
from qat.errors import DataError, SchemeError, StateError
from qat.quantizers import FLOAT, QUANTIZE, WeightFakeQuantize, set_phase
from qat.quantizers.folding import GAMMA_FLOOR
from qat.scheme import Granularity, ObserverSpec, QuantizerSpec, Scheme

PER_TENSOR = Scheme("int8", symmetric=True)
PER_CHANNEL = PER_TENSOR.with_(granularity=Granularity("per_channel", 0))
PER_GROUP = Scheme("uint4", granularity=Granularity("per_group", 1, 2))
SCHEMES = [PER_TENSOR, PER_CHANNEL, PER_GROUP, PER_CHANNEL.with_(dtype="int4", qmin=-7)]
PERCENTILE = PER_CHANNEL.with_(observer=ObserverSpec("percentile", {"percentile": 99.0}))


def attach(
    module: nn.Module, scheme: Scheme, bn: nn.Module | None = None, axis: int = 0, groups: int = 1
) -> WeightFakeQuantize:
    weight = module.weight
    assert isinstance(weight, Tensor)
    quantizer = WeightFakeQuantize(scheme, "0.weight", weight.shape, bn, channel_axis=axis, groups=groups)
    parametrize.register_parametrization(module, "weight", quantizer)
    return quantizer


def original(module: nn.Module) -> Tensor:
    return module.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def used_batch_norm(channels: int, kind: type[nn.modules.batchnorm._BatchNorm] = nn.BatchNorm2d) -> nn.Module:
    bn = kind(channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bn.weight.copy_(torch.randn(channels, generator=generator))
        bn.bias.copy_(torch.randn(channels, generator=generator))
        bn.running_mean.copy_(torch.randn(channels, generator=generator))
        bn.running_var.copy_(torch.rand(channels, generator=generator) * 4)
    return bn


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_forward_is_the_grid_of_codes(scheme: Scheme) -> None:
    conv = nn.Conv2d(5, 8, 3)
    quantizer = attach(conv, scheme)
    weight = original(conv)
    assert torch.equal(conv.weight, weight)
    set_phase(conv, QUANTIZE)
    codes, encoding = quantizer.codes(weight)
    assert codes.shape == weight.shape
    assert codes.dtype == torch.int32
    assert torch.equal(conv.weight, encoding.dequantize(codes))
    assert float((conv.weight - weight).detach().abs().max()) <= 0.51 * max(encoding.scale)
    assert quantizer.scale.numel() == len(encoding.scale)


def test_the_minmax_grid_is_that_of_the_weights_range() -> None:
    linear = nn.Linear(6, 3)
    quantizer = attach(linear, PER_CHANNEL)
    weight = original(linear).detach()
    expected = Encoding.from_range(weight.amin(1), weight.amax(1), PER_CHANNEL, provenance="ptq")
    assert quantizer.codes(weight)[1] == expected
    quantizer.refresh(weight)
    assert torch.equal(quantizer.scale, expected.scale_tensor)
    assert torch.equal(quantizer.zero_point, expected.zero_point_tensor)


def test_the_minmax_grid_follows_the_weight_and_says_so() -> None:
    linear = nn.Linear(6, 3)
    quantizer = attach(linear, PER_CHANNEL)
    quantizer.refresh(original(linear))
    set_phase(linear, QUANTIZE)
    before = linear.weight.detach().clone()
    assert quantizer.codes(original(linear))[1].provenance == "ptq"
    with torch.no_grad():
        original(linear).mul_(3.0)
    assert torch.allclose(linear.weight, 3 * before, rtol=1e-6)
    codes, encoding = quantizer.codes(original(linear))
    assert encoding.provenance == "qat"
    assert torch.equal(linear.weight, encoding.dequantize(codes))


def test_another_observers_grid_is_that_of_the_last_refresh() -> None:
    linear = nn.Linear(200, 3)
    quantizer = attach(linear, PERCENTILE)
    set_phase(linear, QUANTIZE)
    with pytest.raises(StateError, match=r"'0\.weight'.*refresh"):
        _ = linear.weight
    quantizer.refresh(original(linear))
    codes, encoding = quantizer.codes(original(linear))
    assert encoding.method == "percentile"
    assert linear.weight.detach().abs().max() < original(linear).detach().abs().max()
    assert torch.equal(linear.weight, encoding.dequantize(codes))
    with torch.no_grad():
        original(linear).mul_(3.0)
    assert quantizer.codes(original(linear))[1] == encoding


def test_a_loaded_encoding_holds_until_the_next_refresh() -> None:
    linear = nn.Linear(4, 3)
    quantizer = attach(linear, PER_CHANNEL)
    loaded = Encoding.from_range(-torch.ones(3), torch.ones(3), PER_CHANNEL, provenance="imported", method="m")
    quantizer.load_encoding(loaded)
    assert quantizer.codes(original(linear))[1] == loaded
    set_phase(linear, QUANTIZE)
    assert torch.equal(linear.weight, loaded.dequantize(loaded.quantize(original(linear).detach())))
    quantizer.refresh(original(linear))
    assert quantizer.codes(original(linear))[1].provenance == "ptq"


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_normalized_output_is_that_of_the_folded_quantized_layer(scheme: Scheme) -> None:
    conv, bn = nn.Conv2d(4, 8, 3), used_batch_norm(8).eval()
    quantizer = attach(conv, scheme, bn)
    set_phase(conv, QUANTIZE)
    x = torch.randn(2, 4, 6, 6)
    codes, encoding = quantizer.codes(original(conv))
    factor = quantizer.factor()
    assert factor is not None
    # torch.sqrt of float32 may be off by one bit
    root = np.sqrt((bn.running_var + bn.eps).numpy())
    assert np.array_equal(factor.numpy(), bn.weight.detach().numpy() / root)
    bias = (conv.bias - bn.running_mean) * factor + bn.bias
    folded = nn.functional.conv2d(x, encoding.dequantize(codes), bias)
    assert torch.allclose(bn(conv(x)), folded, rtol=1e-4, atol=1e-4)
    # what is quantized is the folded weight, so its own range decides
    spread = (original(conv) * factor.reshape(-1, 1, 1, 1)).detach()
    assert float((encoding.dequantize(codes) - spread).abs().max()) <= 0.51 * max(encoding.scale)


@pytest.mark.parametrize(("groups", "axis"), [(1, 1), (2, 1), (4, 1)])
@pytest.mark.parametrize("channelwise", [False, True])
def test_transposed_convolution_with_groups(groups: int, axis: int, channelwise: bool) -> None:
    deconv = nn.ConvTranspose2d(8, 12, 3, groups=groups)
    bn = used_batch_norm(12).eval()
    scheme = PER_TENSOR.with_(granularity=Granularity("per_channel", axis)) if channelwise else PER_TENSOR
    quantizer = attach(deconv, scheme, bn, axis, groups)
    set_phase(deconv, QUANTIZE)
    x = torch.randn(1, 8, 4, 4)
    codes, encoding = quantizer.codes(original(deconv))
    factor = quantizer.factor()
    assert factor is not None
    bias = (deconv.bias - bn.running_mean) * factor + bn.bias
    folded = nn.functional.conv_transpose2d(x, encoding.dequantize(codes), bias, groups=groups)
    assert torch.allclose(bn(deconv(x)), folded, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_weight_is_the_range_mask() -> None:
    conv, bn = nn.Conv2d(3, 4, 1, bias=False), used_batch_norm(4)
    quantizer = attach(conv, PERCENTILE.with_(observer=ObserverSpec("percentile", {"percentile": 70.0})), bn)
    quantizer.refresh(original(conv))
    set_phase(conv, QUANTIZE)
    upstream = torch.randn(conv.weight.shape)
    conv.weight.backward(upstream)
    factor = quantizer.factor()
    assert factor is not None
    unclamped = torch.round(original(conv) * factor.reshape(-1, 1, 1, 1) / quantizer.scale.reshape(-1, 1, 1, 1))
    inside = (unclamped >= -128) & (unclamped <= 127)
    assert not bool(inside.all())
    assert torch.equal(original(conv).grad, torch.where(inside, upstream, 0.0))
    assert bn.weight.grad is None


def test_a_vanishing_gamma_keeps_its_sign_and_everything_finite() -> None:
    conv, bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([0.0, -0.0, 1e-30, -1e-30]))
    quantizer = attach(conv, PER_CHANNEL, bn)
    set_phase(conv, QUANTIZE)
    factor = quantizer.factor()
    assert factor is not None
    assert factor.tolist() == pytest.approx([GAMMA_FLOOR, -GAMMA_FLOOR] * 2, rel=1e-4)
    assert torch.allclose(conv.weight, original(conv), atol=0.01)
    codes, encoding = quantizer.codes(original(conv))
    assert float(encoding.dequantize(codes).abs().max()) <= GAMMA_FLOOR
    conv.weight.sum().backward()
    assert bool(torch.isfinite(original(conv).grad).all())


def test_batch_norm_without_affine_parameters() -> None:
    linear, bn = nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False).eval()
    bn.running_var.fill_(0.25)
    quantizer = attach(linear, PER_CHANNEL, bn)
    factor = quantizer.factor()
    assert factor is not None
    assert torch.allclose(factor, torch.full((4,), 2.0), rtol=1e-4)


def test_the_batch_norm_is_referred_to_and_not_owned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), used_batch_norm(4))
    keys = set(model.state_dict())
    quantizer = attach(model[0], PER_CHANNEL, model[1])
    assert quantizer.batch_norm is model[1]
    assert list(quantizer.children()) == []
    added = {k.removeprefix("0.parametrizations.weight.") for k in set(model.state_dict()) - keys}
    assert added == {"original", "0.scale", "0.zero_point", "0.min_val", "0.max_val", "0._extra_state"}
    assert len(list(model.parameters())) == 4

    twin = copy.deepcopy(model)
    copied = twin[0].parametrizations.weight[0]
    assert copied.batch_norm is twin[1]
    set_phase(twin, QUANTIZE)
    set_phase(model, QUANTIZE)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        twin[1].weight.mul_(-5.0).add_(0.3)
    assert not torch.equal(twin[0].weight, before)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_state_round_trip(how: str) -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), used_batch_norm(4))
        attach(model[0], PERCENTILE, model[1])
        return model

    model = build()
    model[0].parametrizations.weight[0].refresh(original(model[0]))
    set_phase(model, QUANTIZE)
    state = model.state_dict()
    if how == "torch":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = load(save(state))
    other = build()
    other.load_state_dict(loaded)
    assert torch.equal(other[0].weight, model[0].weight)
    quantizers = [m[0].parametrizations.weight[0] for m in (model, other)]
    assert quantizers[0].codes(original(model[0]))[1] == quantizers[1].codes(original(other[0]))[1]


def test_float_weights_go_in_and_come_out() -> None:
    linear = nn.Linear(3, 2)
    attach(linear, PER_TENSOR.with_(dtype="int4"))
    set_phase(linear, QUANTIZE)
    new = torch.randn(2, 3)
    linear.weight = new.clone()
    assert torch.equal(original(linear), new)
    assert not torch.equal(linear.weight, new)
    set_phase(linear, FLOAT)
    assert torch.equal(linear.weight, new)


def test_bf16_autocast_and_bf16_weights() -> None:
    conv, bn = nn.Conv2d(3, 4, 1), used_batch_norm(4)
    quantizer = attach(conv, PER_CHANNEL, bn)
    set_phase(conv, QUANTIZE)
    outside = conv.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.weight, outside)
        assert conv(torch.randn(1, 3, 2, 2)).dtype == torch.bfloat16
    quantizer.refresh(original(conv))
    scale = quantizer.scale.clone()
    conv.bfloat16()
    assert conv.weight.dtype == torch.bfloat16
    assert torch.equal(quantizer.scale, scale)


def test_bad_weights_are_named() -> None:
    linear = nn.Linear(3, 2)
    quantizer = attach(linear, PER_CHANNEL)
    weight = original(linear).detach().clone()
    weight[0, 1] = float("nan")
    for look in (quantizer.refresh, quantizer.codes):
        with pytest.raises(DataError, match=r"0\.weight"):
            look(weight)
    with pytest.warns(UserWarning, match=r"'0\.weight' is all zero in 1 of 2 channels"):
        quantizer.refresh(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))


@pytest.mark.parametrize(
    ("scheme", "shape", "bn", "options"),
    [
        (PER_CHANNEL.with_(granularity=Granularity("per_channel", 4)), (4, 3), None, {}),
        (PER_CHANNEL, (4, 3), nn.BatchNorm1d(5), {}),
        (PER_CHANNEL, (4, 3), nn.BatchNorm1d(4, track_running_stats=False), {}),
        (PER_CHANNEL, (4, 3), nn.LayerNorm(4), {}),
        (PER_CHANNEL, (4, 3), None, {"channel_axis": 2}),
        (PER_CHANNEL, (4, 3), None, {"groups": 2}),
        (PER_CHANNEL, (4, 3), None, {"groups": 3, "channel_axis": 1}),
        (PER_CHANNEL, (0, 3), None, {}),
        (PER_CHANNEL.with_(quantizer=QuantizerSpec("pact")), (4, 3), None, {}),
        (Scheme("int32"), (4, 3), None, {}),
    ],
)
def test_bad_arguments_are_named(
    scheme: Scheme, shape: tuple[int, ...], bn: nn.Module | None, options: dict[str, int]
) -> None:
    with pytest.raises(SchemeError, match=r"'0\.weight'"):
        WeightFakeQuantize(scheme, "0.weight", shape, bn, **options)
