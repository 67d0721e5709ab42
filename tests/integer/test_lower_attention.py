"""Tokens: softmax, layer norm, products of activations, attention. Equal codes in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, take


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "arm-cpu"])
def test_softmax_over_any_axis(target: str) -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.b((m.a(x) * 4).softmax(axis)) for axis in (1, 2, 3, -1)]

    take(Fn(forward, a=conv(), b=conv()), torch.randn(3, 4, 6, 7), target=target)


def test_a_softmax_over_one_element_is_one() -> None:
    whole = take(Fn(lambda m, x: (m.a(x)[:, :1] * 9).softmax(1), a=conv()), torch.randn(3, 4, 6, 7))
    # the largest code of the fixed range is 255/256
    assert set(whole.outputs()[0].unique().tolist()) == {255 / 256}


def test_layer_norms() -> None:
    norms = {
        "affine": nn.LayerNorm(16),
        "plain": nn.LayerNorm(16, elementwise_affine=False),
        "no_bias": nn.LayerNorm(16, bias=False),
        "two": nn.LayerNorm((5, 16)),
        "large_epsilon": nn.LayerNorm(16, eps=0.1),
    }
    for norm in norms.values():
        if norm.weight is not None:
            nn.init.normal_(norm.weight)
        if norm.bias is not None:
            nn.init.normal_(norm.bias)

    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [*[m.b(getattr(m, name)(m.a(x))) for name in norms], m.b(F.layer_norm(m.a(x), (16,)))]

    take(Fn(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), **norms), torch.randn(3, 5, 8))


def test_a_layer_norm_of_few_features() -> None:
    take(nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 4)), torch.randn(5, 8))


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def test_products_of_activations() -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        a, b = m.a(x), m.b(x)
        return [a @ b.mT, torch.bmm(a, b.transpose(1, 2)), heads(a) @ heads(b).mT, a.softmax(-1) @ m.c(x).mT]

    linears = {name: nn.Linear(8, 16) for name in "abc"}
    whole = take(Fn(forward, **linears), torch.randn(3, 5, 8))
    assert whole.kinds().count("matmul") == 4


def test_products_with_constants() -> None:
    def forward(m: Fn, x: Tensor) -> list[Tensor]:
        return [m.a(x) @ m.right, m.left @ m.a(x)]

    left, right = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(7, 5))
    take(Fn(forward, a=conv(), left=left, right=right), torch.randn(3, 4, 6, 7))


MASKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "none": ({}, set()),
    "scale": ({"scale": 0.7}, set()),
    "added": ({"attn_mask": torch.linspace(-2, 2, 25).reshape(5, 5)}, set()),
    # infinities have no codes: adding them and the softmax over them are computed in float
    "causal": ({"is_causal": True}, {"island", "softmax"}),
    "boolean": ({"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)}, {"island", "softmax"}),
}


@pytest.mark.parametrize(("options", "floats"), MASKS.values(), ids=list(MASKS))
def test_scaled_dot_product_attention(options: dict[str, Any], floats: set[str]) -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), **options)
        return m.out(mixed.transpose(1, 2).flatten(2))

    model = Fn(forward, **{name: nn.Linear(8, 16) for name in "qkv"}, out=nn.Linear(16, 8))
    whole = take(model, torch.randn(3, 5, 8), floats=floats)
    assert whole.kinds().count("matmul") == 2


@pytest.mark.parametrize("weights", [True, False])
def test_multi_head_attention(weights: bool) -> None:
    model = Fn(
        lambda m, x: m.n(x, x, x, need_weights=weights)[: 2 if weights else 1],
        n=nn.MultiheadAttention(16, 4, batch_first=True),
    )
    whole = take(model, torch.randn(3, 5, 16))
    assert {"linear", "matmul", "softmax"} <= set(whole.kinds())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu"),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
    ],
    ids=["post", "pre", "two"],
)
def test_transformer_encoders(make: Callable[[], nn.Module]) -> None:
    take(make(), torch.randn(3, 5, 16))


class Tokens(nn.Module):
    """A class token, a position embedding, and a head on the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16) * 0.3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        return self.head(self.norm(tokens)[:, 0])


def test_a_class_token_and_a_position_embedding() -> None:
    whole = take(Tokens(), torch.randn(3, 3, 8, 8))
    assert whole.program.constants["token"].value.dtype == torch.uint8
    assert whole.program.constants["position"].value.dtype == torch.uint8
    seven = torch.randn(7, 3, 8, 8)
    assert whole.imodel(seven).shape == (7, 7)
