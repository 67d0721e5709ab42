"""Weights and biases of a prepared model as integers, with batch norm folded in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.graph.fusions import Fusion
from qat.graph.operators import ParamRef
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import PreparedModel
from qat.integer.program import Constant
from qat.quantizers import WeightFakeQuantize
from qat.scheme import Granularity, Scheme, int_type

#: A bias beyond this many steps is brought back by a coarser weight scale; the rest of int32 is left to the products.
_BIAS_LIMIT = 1 << 30
#: How much finer than useless the weight scale of a dead channel is made. The bias is then exact to a hundredth of a
#: step of the result, or so; a full input still moves the result
_FINER = 64.0


@dataclass(frozen=True)
class Affine:
    """Float weight and bias of a convolution or linear operator, batch norm folded in.

    Attributes:
        weight: float32, the shape of the module's weight.
        bias: float64, shape (output channels,), or None.
        axis: Axis of the output channels of `weight`.
        quantizer: The trained quantizer of the weight, or None where it is not quantized.
        original: The float weight before folding.
    """

    weight: Tensor
    bias: Tensor | None
    axis: int
    quantizer: WeightFakeQuantize | None
    original: Tensor


def parameter(prepared: PreparedModel, ref: ParamRef) -> tuple[Tensor, WeightFakeQuantize | None]:
    """Return the float value of a parameter or buffer and its weight quantizer, if it has one."""
    owner: nn.Module = prepared.get_submodule(ref.module)
    if nn.utils.parametrize.is_parametrized(owner, ref.attribute):
        chain: Any = owner.parametrizations[ref.attribute]  # type: ignore[index]
        if isinstance(chain[0], WeightFakeQuantize):
            return chain.original.detach(), chain[0]
    return getattr(owner, ref.attribute).detach(), None


def folded(prepared: PreparedModel, fusion: Fusion) -> Affine:
    """Return the weight and bias of a fusion's first operator with its batch norm folded in."""
    op = fusion.ops[0]
    assert op.weight is not None
    original, quantizer = parameter(prepared, op.weight)
    value = original.float() if quantizer is None else quantizer.method.transform(original).float()
    axis = 1 if op.kind == "conv_transpose" else 0
    bias_ref = op.inputs[2] if len(op.inputs) > 2 else None
    bias = parameter(prepared, bias_ref)[0].double() if isinstance(bias_ref, ParamRef) else None
    norm = fusion.batch_norm
    if norm is None:
        return Affine(value, bias, axis, quantizer, original)
    factor, shift = norm_affine(prepared, norm)
    shape = [-1 if d == axis else 1 for d in range(original.dim())]
    # where the weight is quantized, the very factor that training used
    trained = quantizer.factor() if quantizer is not None else None
    weight = value * (factor.float() if trained is None else trained).reshape(shape)
    return Affine(weight, (bias * factor if bias is not None else 0.0) + shift, axis, quantizer, original)


def norm_affine(prepared: PreparedModel, norm: GraphOp) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a batch norm in evaluation, float64, shape (channels,)."""
    gamma, beta, mean, variance = (
        parameter(prepared, ref)[0].double() if isinstance(ref, ParamRef) else None for ref in norm.inputs[1:5]
    )
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + float(norm.attrs["eps"]))
    if gamma is not None:
        factor = factor * gamma
    shift = -mean * factor
    return factor, shift if beta is None else shift + beta


def quantize_affine(
    name: str, keys: tuple[str, str], affine: Affine, scheme: Scheme, x: Encoding, y: Encoding
) -> tuple[Constant, Constant | None]:
    """Quantize weight and bias of an operator.

    Where a bias would need more than 30 bits (the weights of a channel are tiny against its bias), that channel's
    weight scale is made coarser until it fits; the weights there contribute next to nothing.

    The other way round, a bias is rounded to steps of input scale times weight scale. In a channel whose input never
    moves, the batch norm has next to no variance, the folded weights are huge, and the step may be larger than all that
    the output can hold. There the weight scale is made finer, to where the largest weight times one code of the input
    is a 64th of the range of the output.

    Args:
        name: Name of the operator, for messages.
        keys: Names of the constants of weight and bias.
        affine: Float weight and bias.
        scheme: Scheme of the weight.
        x: Encoding of the input.
        y: Encoding of the result.

    Raises:
        ExportError: A bias is not finite; the operator is named.
    """
    if affine.quantizer is not None:
        codes, encoding = affine.quantizer.codes(affine.original)
    else:
        encoding = _weight_encoding(affine.weight, scheme)
        codes = encoding.quantize(affine.weight)
    if affine.bias is None:
        return Constant(keys[0], storage(codes, encoding.dtype), encoding), None
    if not bool(torch.isfinite(affine.bias).all()):
        raise ExportError(
            f"{name}: its bias with batch norm folded in is not finite", "check the batch norm statistics"
        )
    x_scale = torch.tensor(x.scale[0], dtype=torch.float32)
    channels = affine.bias.numel()
    if encoding.granularity.kind != "per_group":
        needed = (affine.bias.abs() / (x_scale.double() * _BIAS_LIMIT)).float()
        if encoding.per_tensor:
            needed = needed.max().reshape(1)
        scale = encoding.scale_tensor.reshape(-1)
        fitting = torch.maximum(_without_dead(encoding, affine.bias, x, y), needed)
        if not torch.equal(fitting, scale):
            encoding = replace(encoding, scale=tuple(fitting.tolist()))
            codes = encoding.quantize(affine.weight)
    bias_scale = bias_scales(encoding, x_scale, channels)
    exact = affine.bias.to(bias_scale.device) / bias_scale.double()
    bias_codes = torch.round(exact).clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)
    # one scale where the weight has one: Hexagon's compiler misreads a bias by channel beside a weight by tensor
    scales = bias_scale[:1] if encoding.per_tensor else bias_scale
    bias_encoding = Encoding(
        dtype="int32",
        scale=tuple(scales.tolist()),
        zero_point=(0,) * scales.numel(),
        qmin=-(1 << 31),
        qmax=(1 << 31) - 1,
        symmetric=True,
        granularity=Granularity() if encoding.per_tensor else Granularity("per_channel", 0),
        provenance="derived",
        method="input scale times weight scale",
    )
    return Constant(keys[0], storage(codes, encoding.dtype), encoding), Constant(keys[1], bias_codes, bias_encoding)


def _without_dead(weight: Encoding, bias: Tensor, x: Encoding, y: Encoding) -> Tensor:
    """Return the weight scale of each channel, float32, finer where the largest weight is useless.

    That is where it times one code of the input is more than all that the result can hold. Not with one scale for all
    channels, and not where the bias by itself is far outside of what the result can hold, for the products may be what
    brings it back.
    """
    scale, (low, high) = weight.scale_tensor.reshape(-1), y.representable()
    if weight.per_tensor or scale.numel() != bias.numel():
        return scale
    within = (bias >= low - (high - low)) & (bias <= high + (high - low))
    useful = (high - low) / (max(abs(weight.qmin), weight.qmax) * x.scale[0])
    return torch.where(within & (scale > useful), torch.tensor(useful / _FINER), scale)


def quantize_parameters(
    name: str, keys: tuple[str, ...], values: tuple[Tensor | None, ...], x: Encoding
) -> list[Constant]:
    """Quantize the slopes of a PReLU, or factor and offset of a layer norm.

    Slopes and factors get 8 bits and one scale, unsigned where the activations are (Qualcomm's compiler has no other
    pairs); an offset gets 32 bits at the scale of the products.

    Args:
        name: Name of the operator, for messages.
        keys: Names of the constants; that of an absent one is not read.
        values: Slopes, or factor and offset; float32.
        x: Encoding of the input.

    Raises:
        ExportError: A value is not finite; the operator and the parameter are named.
    """
    scheme = Scheme(dtype="int8" if int_type(x.dtype).signed else "uint8")
    found: list[Constant] = []
    factor_scale = 1.0
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        if value is None:
            continue
        if not bool(torch.isfinite(value).all()):
            raise ExportError(f"{name}: {key} is not finite", "check the parameter")
        if number == 0:
            encoding = Encoding.from_range(
                value.min(), value.max(), scheme, provenance="derived", method="min-max of the parameter"
            )
            factor_scale = encoding.scale[0]
        else:
            encoding = Encoding(
                "int32", (x.scale[0] * factor_scale,), (0,), -(1 << 31), (1 << 31) - 1, symmetric=True,
                provenance="derived", method="input scale times that of the factor",
            )  # fmt: skip
        found.append(Constant(key, storage(encoding.quantize(value), encoding.dtype), encoding))
    return found


def bias_scales(weight: Encoding, x_scale: Tensor, channels: int) -> Tensor:
    """Return the bias scale of each output channel, float32: input scale times weight scale.

    With per-group weights the largest scale of the channel is taken, since there is none that fits all.
    """
    scale = weight.scale_tensor.reshape(-1)
    if weight.granularity.kind == "per_group":
        scale = scale.reshape(channels, -1).amax(1)
    return (x_scale * scale).expand(channels).contiguous()


def _weight_encoding(weight: Tensor, scheme: Scheme) -> Encoding:
    axis = scheme.granularity.axis
    rows = weight.movedim(axis, 0).flatten(1) if scheme.granularity.kind == "per_channel" else weight.reshape(1, -1)
    return Encoding.from_range(rows.amin(1), rows.amax(1), scheme, provenance="derived", method="min-max of the weight")


def storage(codes: Tensor, dtype: str) -> Tensor:
    """Return codes in the torch type that stores `dtype` (int8 for int4, uint8 for uint4)."""
    types = {
        "int4": torch.int8, "uint4": torch.uint8, "int8": torch.int8, "uint8": torch.uint8,
        "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32,
    }  # fmt: skip
    return codes.to(types[dtype])
