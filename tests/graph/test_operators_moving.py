"""Calls that only move values: their kinds and attributes, and that these alone reproduce the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_reference import IMAGE, TOKENS, Call, check, operators_of
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("function", "shape", "axis"),
    [
        (lambda x: torch.cat([x, x], 1), IMAGE, 1),
        (lambda x: torch.concat((x, x), dim=-1), IMAGE, 3),
        (lambda x: torch.hstack([x, x]), TOKENS, 1),
        (lambda x: torch.cat([x, x]), TOKENS, 0),
    ],
)
def test_concatenation(function, shape, axis):
    check(function, shape, "concat", axis=axis)


@pytest.mark.parametrize(("dim", "axis"), [(0, 0), (1, 1), (-1, 3)])
def test_stack(dim, axis):
    check(lambda x: torch.stack([x, x], dim), TOKENS, "stack", axis=axis)


@pytest.mark.parametrize(
    ("model", "shape", "to"),
    [
        (nn.Flatten(), IMAGE, (-1, 192)),
        (nn.Flatten(2), IMAGE, (-1, 4, 48)),
        (nn.Unflatten(1, (2, 2)), IMAGE, (-1, 2, 2, 8, 6)),
        (lambda x: torch.flatten(x, 1), IMAGE, (-1, 192)),
        (lambda x: x.flatten(start_dim=2), IMAGE, (-1, 4, 48)),
        (lambda x: x.view(-1, 2, 96), IMAGE, (-1, 2, 96)),
        (lambda x: x.view(x.size(0), -1), IMAGE, (-1, 192)),
        (lambda x: x.reshape(x.shape[0] * 4, 48), IMAGE, (-1, 48)),
        (lambda x: torch.reshape(x, (4, -1, 48)), IMAGE, (4, -1, 48)),
        (lambda x: x.unflatten(1, (2, 2)), IMAGE, (-1, 2, 2, 8, 6)),
        (lambda x: x.unsqueeze(1), TOKENS, (-1, 1, 5, 8)),
        (lambda x: torch.squeeze(x, 1), (1, 5), (-1, 5)),
        (lambda x: x.squeeze((1, 3)), (1, 5, 1), (-1, 5)),
    ],
)
def test_reshapes(model, shape, to):
    check(model, shape, "reshape", shape=to)


@pytest.mark.parametrize(
    ("function", "shape", "perm"),
    [
        (lambda x: x.permute(0, 2, 3, 1), IMAGE, (0, 2, 3, 1)),
        (lambda x: x.permute((0, -1, 1, 2)), IMAGE, (0, 3, 1, 2)),
        (lambda x: torch.permute(x, dims=(0, 2, 1)), TOKENS, (0, 2, 1)),
        (lambda x: torch.transpose(x, 1, -1), IMAGE, (0, 3, 2, 1)),
        (lambda x: x.swapdims(1, 2), TOKENS, (0, 2, 1)),
        (lambda x: x.t(), (5,), (1, 0)),
        (lambda x: x.T, (5,), (1, 0)),
        (lambda x: x.mT, TOKENS, (0, 2, 1)),
        (lambda x: x.movedim(1, -1), IMAGE, (0, 2, 3, 1)),
        (lambda x: torch.movedim(x, (2, 3), (0, 1)), IMAGE, (2, 3, 0, 1)),
    ],
)
def test_transposes(function, shape, perm):
    check(function, shape, "transpose", perm=perm)


@pytest.mark.parametrize(
    "model",
    [
        nn.Identity(),
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.to("cpu"),
        lambda x: x + 0,
        lambda x: x * 1.0,
        lambda x: x.roll(0, 1),
        lambda x: x[:, :],
        lambda x: x[:100],
        nn.AdaptiveAvgPool2d((8, 6)),
        nn.AdaptiveMaxPool2d((None, 6)),
    ],
)
def test_identities(model):
    assert not check(model, IMAGE, "identity").training_only


@pytest.mark.parametrize(
    "model", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), lambda x: F.dropout(x, 0.5, training=False)]
)
def test_dropout_is_an_identity_that_acts_in_training(model):
    assert check(model, IMAGE, "identity").training_only


@pytest.mark.parametrize(
    ("function", "kinds", "attrs"),
    [
        (lambda x: x[:, 1:3], "slice", {"axes": (1,), "starts": (1,), "ends": (3,), "steps": (1,)}),
        (lambda x: x[..., ::2], "slice", {"axes": (3,), "starts": (0,), "ends": (6,), "steps": (2,)}),
        (lambda x: x[:, :, -3:, :-1], "slice", {"axes": (2, 3), "starts": (5, 0), "ends": (8, 5)}),
        (lambda x: x[: x.shape[0], 0:1], "slice", {"axes": (1,), "starts": (0,), "ends": (1,)}),
        (lambda x: x.narrow(2, 1, 4), "slice", {"axes": (2,), "starts": (1,), "ends": (5,)}),
        (lambda x: x.flip(1), "slice", {"axes": (1,), "starts": (3,), "ends": (-5,), "steps": (-1,)}),
        (lambda x: torch.flip(x, [2, -1]), "slice", {"axes": (2, 3), "steps": (-1, -1)}),
        (torch.fliplr, "slice", {"axes": (1,)}),
        (lambda x: x[:, None], "reshape", {"shape": (-1, 1, 4, 8, 6)}),
        (lambda x: x[..., None], "reshape", {"shape": (-1, 4, 8, 6, 1)}),
    ],
)
def test_parts_without_vanishing_axes(function, kinds, attrs):
    check(function, IMAGE, kinds, **attrs)


def cut(axis: int, start: int, end: int) -> tuple[str, Mapping[str, Any]]:
    return "slice", {"axes": (axis,), "starts": (start,), "ends": (end,), "steps": (1,)}


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (lambda x: x[:, 0], (cut(1, 0, 1), ("reshape", {"shape": (-1, 8, 6)}))),
        (lambda x: x[:, -1], (cut(1, 3, 4), ("reshape", {"shape": (-1, 8, 6)}))),
        (lambda x: x[..., 2:4, None, 5], None),
        (lambda x: x.select(2, -1), (cut(2, 7, 8), ("reshape", {"shape": (-1, 4, 6)}))),
        (lambda x: torch.roll(x, (2, -1), (2, 3)), (("roll", {"shifts": (2, 5), "axes": (2, 3)}),)),
        (lambda x: x.roll(9, 2), (("roll", {"shifts": (1,), "axes": (2,)}),)),
        (
            nn.PixelShuffle(2),
            (
                ("reshape", {"shape": (-1, 1, 2, 2, 8, 6)}),
                ("transpose", {"perm": (0, 1, 4, 2, 5, 3)}),
                ("reshape", {"shape": (-1, 1, 16, 12)}),
            ),
        ),
        (lambda x: F.pixel_shuffle(x, 2), None),
        (nn.PixelUnshuffle(2), None),
        (
            nn.ChannelShuffle(2),
            (
                ("reshape", {"shape": (-1, 2, 2, 8, 6)}),
                ("transpose", {"perm": (0, 2, 1, 3, 4)}),
                ("reshape", {"shape": (-1, 4, 8, 6)}),
            ),
        ),
    ],
)
def test_chains(model, steps):
    op = check(model, IMAGE, "chain")
    if steps is not None:
        assert op.attrs["steps"] == steps


@pytest.mark.parametrize(
    ("function", "sections", "last"),
    [
        (lambda x: x.chunk(2, 1)[1], (2, 2), (2, 4)),
        (lambda x: torch.chunk(x, 3, dim=2)[-1], (3, 3, 2), (6, 8)),
        (lambda x: torch.split(x, 3, 2)[2], (3, 3, 2), (6, 8)),
        (lambda x: x.split([1, 3], dim=1)[1], (1, 3), (1, 4)),
        (lambda x: torch.tensor_split(x, (2, 5), 3)[1], (2, 3, 1), (2, 5)),
    ],
)
def test_items_of_a_split_are_slices_of_what_was_split(function, sections, last):
    ops = operators_of(Call(function), torch.randn(2, *IMAGE))
    assert [op.kind for op in ops] == ["split", "slice"]
    assert ops[0].attrs["sections"] == sections
    assert ops[1].inputs == ops[0].inputs
    assert (*ops[1].attrs["starts"], *ops[1].attrs["ends"]) == last
    check(function, IMAGE, "split slice")


def test_items_of_a_part_of_a_split():
    check(lambda x: x.chunk(4, 1)[1:][1], IMAGE, "split slice")


def test_items_of_unbind_lose_the_axis():
    check(lambda x: x.unbind(1)[2], IMAGE, "split chain")


def attend(x: Tensor) -> Tensor:
    n, t, _ = x.shape
    qkv = x.reshape(n, t, 2, 2, 2).permute(2, 0, 3, 1, 4)
    return qkv[0] + qkv[1]


def test_the_packed_projection_of_attention():
    check(attend, TOKENS, "reshape transpose chain chain add")


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, a: x + a.expand(x.shape[0], -1, -1), (-1, 5, 8)),
        (lambda x, a: x + a.expand_as(x), (-1, 5, 8)),
        (lambda x, a: x + torch.broadcast_to(a, x.shape), (-1, 5, 8)),
        (lambda x, a: x + a.repeat(x.shape[0], 1, 1), (-1, 5, 8)),
    ],
)
def test_expansion_of_a_parameter_over_the_batch(function, shape):
    op = check(Call(function, torch.randn(1, 5, 8)), TOKENS, "expand add", shape=shape)
    assert op.inputs[0].key == "a"
