"""Pooling, interpolation, padding, means and data movements inside networks: equal codes in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, take


def between(move: Callable[[Tensor], Tensor], count: int = 4) -> Fn:
    """A movement between two convolutions: it is on codes, and its result is read as codes."""
    return Fn(lambda m, x: m.b(move(m.a(x))), a=conv(), b=conv(count))


def sides(moves: dict[str, Callable[[Tensor], Tensor]]) -> Fn:
    """Each movement between its own convolution and an activation, or an output."""
    convs = {f"c{i}": conv() for i in range(len(moves))}

    def forward(m: Fn, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for i, (name, move) in enumerate(moves.items()):
            y = move(getattr(m, f"c{i}")(x))
            found[name], found[f"{name} and more"] = y, F.hardswish(y)
        return found

    return Fn(forward, **convs)


# pooling ------------------------------------------------------------------------------------------------------------

POOLS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(3, 2, 1),
    "max_ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "max_dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "average": lambda: nn.AvgPool2d(3, 2, 1),
    "average_ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "average_ceil_padded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average_uncounted": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average_ceil_uncounted": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "global_average": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((2, 4)),
    "adaptive_one_way": lambda: nn.AdaptiveAvgPool2d((None, 1)),
    "adaptive_max": lambda: nn.AdaptiveMaxPool2d(2),
}


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "arm-cpu"])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_pooling(target: str, size: tuple[int, int]) -> None:
    pools = {name: make() for name, make in POOLS.items()}

    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.after(getattr(m, name)(m.before(x))) for name in pools]

    take(Fn(forward, before=conv(), after=conv(), **pools), torch.randn(3, 4, *size), target=target, steps=3)


def test_pooling_in_one_and_three_dimensions() -> None:
    one = nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.MaxPool1d(2, 2, 1, ceil_mode=True), nn.Conv1d(4, 4, 1), nn.AvgPool1d(3, 2, 1, True)
    )
    take(one, torch.randn(3, 4, 12))
    three = nn.Sequential(nn.Conv3d(4, 4, 3), nn.MaxPool3d(2), nn.AvgPool3d(2), nn.Conv3d(4, 4, 1))
    take(nn.Sequential(three, nn.AdaptiveAvgPool3d(1)), torch.randn(3, 4, 10, 10, 10))


@pytest.mark.parametrize("keepdim", [True, False])
def test_means_over_any_axes(keepdim: bool) -> None:
    axes = [(2, 3), (1,), (1, 2), (3,), (2,), (1, 2, 3), (-1,)]

    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.a(x).mean(a, keepdim=keepdim) for a in axes]

    whole = take(Fn(forward, a=conv()), torch.randn(3, 4, 6, 7))
    assert whole.kinds().count("mean") == len(axes)


# interpolation ------------------------------------------------------------------------------------------------------

RESIZES: dict[str, dict[str, Any]] = {
    "nearest_twice": {"scale_factor": 2},
    "nearest_size": {"size": (11, 13)},
    "nearest_factor": {"scale_factor": 1.3},
    "bilinear_twice": {"scale_factor": 2, "mode": "bilinear"},
    "bilinear_factors": {"scale_factor": (2, 3), "mode": "bilinear"},
    "bilinear_factor": {"scale_factor": 1.3, "mode": "bilinear"},
    "bilinear_recomputed": {"scale_factor": 1.3, "mode": "bilinear", "recompute_scale_factor": True},
    "bilinear_down": {"scale_factor": 0.5, "mode": "bilinear"},
    "bilinear_size": {"size": (5, 17), "mode": "bilinear"},
    "bilinear_same": {"size": (8, 8), "mode": "bilinear"},
    "corners_size": {"size": (11, 5), "mode": "bilinear", "align_corners": True},
    "corners_factor": {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
}


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "arm-cpu"])
def test_interpolation(target: str) -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.after(F.interpolate(m.before(x), **kwargs)) for kwargs in RESIZES.values()]

    whole = take(Fn(forward, before=conv(), after=conv()), torch.randn(3, 4, 8, 8), target=target)
    assert whole.kinds().count("resize") >= len(RESIZES) - 1


def test_interpolation_in_one_and_three_dimensions() -> None:
    one = [nn.Upsample(scale_factor=2, mode="linear"), nn.Upsample(size=11, mode="linear", align_corners=True)]
    one.append(nn.Upsample(scale_factor=1.7))
    take(
        Fn(lambda m, x: [m.b(f(m.a(x))) for f in one], a=nn.Conv1d(4, 4, 3), b=nn.Conv1d(4, 4, 1)), torch.randn(3, 4, 9)
    )
    three = [nn.Upsample(scale_factor=2, mode="trilinear"), nn.Upsample(scale_factor=1.5)]
    model = Fn(lambda m, x: [m.b(f(m.a(x))) for f in three], a=nn.Conv3d(4, 4, 1), b=nn.Conv3d(4, 4, 1))
    # its eight products are added in another order
    whole = take(model, torch.randn(3, 4, 5, 4, 3), bound=1)
    assert all(tensor.unequal_share < 1e-2 for tensor in whole.verification.tensors)


# padding ------------------------------------------------------------------------------------------------------------

PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: F.pad(x, (1, 2, 0, 3)),
    "value": lambda x: F.pad(x, (1, 1), value=0.6),
    "reflect": lambda x: F.pad(x, (1, 2, 1, 1), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 2, 1, 1), "replicate"),
    "channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:5],
}


@pytest.mark.parametrize("pad", list(PADS.values()), ids=list(PADS))
@pytest.mark.parametrize("before", [lambda x: x, F.relu], ids=["signed", "positive"])
def test_padding(pad: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor]) -> None:
    whole = take(between(lambda x: pad(before(x))), torch.randn(3, 4, 6, 7))
    assert "pad" in whole.kinds()


# movements ----------------------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "flatten_some": lambda x: x.flatten(2),
    "reshape": lambda x: x.reshape(x.shape[0], 2, 2, -1),
    "view": lambda x: x.view(-1, 36),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "split_sizes": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unbind": lambda x: x.unbind(2)[3],
    "slice": lambda x: x[:, 1:3, ::2, :-1],
    "slice_end": lambda x: x[..., -3:],
    "new_axis": lambda x: x[:, None],
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(2, 1, 3),
    "flip": lambda x: x.flip(2, 3),
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "roll_by_nothing": lambda x: x.roll(6, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "channel_shuffle_by_hand": lambda x: x.view(x.shape[0], 2, 2, 6, 6).transpose(1, 2).flatten(1, 2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "movedim": lambda x: x.movedim(1, -1),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "into_the_batch": lambda x: x.reshape(-1, 6, 6),
    "batch_moved": lambda x: x.permute(1, 0, 2, 3).reshape(2, -1, 6, 6),
    "windows": lambda x: x.view(x.shape[0], 4, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 4),
    "rescaled": lambda x: x * 0.5,
    "rescaled_and_moved": lambda x: (x * 0.5).flatten(1) / 3,
}


@pytest.mark.parametrize("names", [list(MOVES)[::2], list(MOVES)[1::2]], ids=["even", "odd"])
def test_movements(names: list[str]) -> None:
    whole = take(sides({name: MOVES[name] for name in names}), torch.randn(3, 4, 6, 6))
    # nothing is quantized anew where codes only move
    assert "requantize" not in whole.kinds()


def test_movements_of_an_input_that_nothing_else_reads_stay_float() -> None:
    model = Fn(lambda m, x, y: (m.a(x), y.flatten(1), y * 2), a=conv())
    whole = take(model, torch.randn(3, 4, 6, 6), torch.randn(3, 2, 5), floats={"reshape", "rescale"})
    assert torch.equal(whole.outputs()[1], whole.inputs[1].flatten(1))


# concatenation ------------------------------------------------------------------------------------------------------


def joined(parts: Callable[[Fn, Tensor], list[Tensor]], count: int, axis: int = 1) -> Fn:
    return Fn(lambda m, x: m.c(torch.cat(parts(m, x), axis)), a=conv(), b=conv(), c=conv(count))


def test_all_that_is_concatenated_shares_one_encoding() -> None:
    whole = take(joined(lambda m, x: [m.a(x), F.max_pool2d(m.b(x), 3, 1, 1), x], 12), torch.randn(3, 4, 6, 6))
    encodings = {whole.program.tensors[name].encoding.scale for name in ("a", "b", "inputs_0", "cat")}
    assert len(encodings) == 1
    assert "requantize" not in whole.kinds()


def test_what_cannot_share_is_requantized() -> None:
    softmax = take(joined(lambda m, x: [m.a(x).softmax(1), m.b(x)], 8), torch.randn(3, 4, 6, 6))
    assert softmax.kinds().count("requantize") == 1
    rescaled = take(joined(lambda m, x: [m.a(x) * 0.3, m.b(x)], 4, -1), torch.randn(3, 4, 6, 6))
    assert rescaled.kinds().count("requantize") == 1


def test_one_tensor_twice_and_concats_of_concats() -> None:
    def parts(m: Fn, x: Tensor) -> list[Tensor]:
        y = m.b(x)
        return [y, y, torch.cat([m.a(x), y], 1), y * 3]

    take(joined(parts, 20), torch.randn(3, 4, 6, 6))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_stack(axis: int) -> None:
    model = Fn(lambda m, x: torch.stack([m.a(x), m.b(x), m.a(x).softmax(1)], axis).mean(axis), a=conv(), b=conv())
    take(model, torch.randn(3, 4, 6, 6))


def test_stack_of_floats() -> None:
    model = Fn(lambda m, x: (m.a(x), torch.stack([x.abs(), x], 2)), a=conv())
    layers = {"stack": "float", "abs": "float"}
    whole = take(
        model, torch.randn(3, 4, 6, 6), scheme={"layers": layers}, floats={"table", "reshape", "concat"}, bound=1e-3
    )
    assert torch.equal(whole.outputs()[1], model(*whole.inputs)[1])
