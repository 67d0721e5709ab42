"""Attention is traced into operators that equal torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat.graph.trace import trace, traced_forward

L, S, N, E, H = 4, 6, 2, 8, 2


class Attention(nn.Module):
    """Multi-head attention on a batch of sequences, in the layout of the module."""

    def __init__(self, batch_first=True, masks=None, call=None, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.masks = masks or {}
        self.call = call or {}

    def forward(self, query, key=None, value=None, **masks):
        query, key, value = (t if t is None or self.mha.batch_first else t.transpose(0, 1) for t in (query, key, value))
        key = query if key is None else key
        value = key if value is None else value
        out, weights = self.mha(query, key, value, **self.masks, **masks, **self.call)
        out = out if self.mha.batch_first else out.transpose(0, 1)
        return out if weights is None else (out, weights)


def check(model, inputs, training=False):
    model.eval()
    traced = trace(copy.deepcopy(model), inputs)
    assert not traced.islands
    assert traced.static_batch is None
    model.train(training)
    traced.root.train(training)
    bigger = {k: torch.cat([v, v.flip(0), v]) for k, v in inputs.items()}
    torch.testing.assert_close(traced_forward(traced)(**bigger), model(**bigger), atol=1e-5, rtol=1e-5)
    targets = {getattr(n.target, "__name__", n.target) for n in traced.graph.nodes}
    assert not targets & {"scaled_dot_product_attention", "multi_head_attention_forward", "mha"}
    return traced


def self_input():
    return {"query": torch.randn(N, L, E)}


BOOL_MASK = torch.ones(L, L).triu(1).bool()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"need_weights": False}),
        ({}, {"need_weights": True}),
        ({}, {"need_weights": True, "average_attn_weights": False}),
        ({"bias": False}, {"need_weights": False}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {"need_weights": True}),
        ({"dropout": 0.5}, {"need_weights": False}),
        ({}, {"need_weights": False, "attn_mask": BOOL_MASK, "is_causal": True}),
        ({}, {"need_weights": True, "attn_mask": BOOL_MASK.float() * -3}),
    ],
)
def test_self_attention(batch_first, options, call):
    check(Attention(batch_first, call=call, **options), self_input())


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_with_separate_weights(batch_first):
    inputs = {"query": torch.randn(N, L, E), "key": torch.randn(N, S, 5), "value": torch.randn(N, S, 3)}
    check(Attention(batch_first, kdim=5, vdim=3), inputs)
    inputs = {"query": torch.randn(N, L, E), "key": torch.randn(N, S, E)}
    check(Attention(batch_first), inputs)


def test_masks_as_inputs():
    padding = torch.tensor([[False] * L, [False, True] * (L // 2)])
    check(Attention(), self_input() | {"key_padding_mask": padding})
    check(Attention(), self_input() | {"key_padding_mask": padding.float() * -2})
    check(Attention(masks={"attn_mask": BOOL_MASK}), self_input() | {"key_padding_mask": padding})
    per_head = torch.zeros(N * H, L, L)
    per_head[:, 0, 1] = -5
    trace_ = trace(Attention().eval(), self_input() | {"attn_mask": per_head})
    assert trace_ is not None
    model = Attention().eval()
    inputs = self_input() | {"attn_mask": per_head}
    traced = trace(copy.deepcopy(model), inputs)
    torch.testing.assert_close(traced_forward(traced)(**inputs), model(**inputs), atol=1e-5, rtol=1e-5)


def test_training_without_dropout_equals_and_gives_the_same_gradients():
    model = Attention(call={"need_weights": False})
    traced = check(model, self_input(), training=True)
    x = torch.randn(3, L, E)
    model(x).square().sum().backward()
    traced_forward(traced)(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), traced.root.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_dropout_acts_in_training():
    traced = check(Attention(dropout=0.5, call={"need_weights": False}), self_input())
    traced.root.train()
    run, x = traced_forward(traced), torch.randn(1, L, E)
    assert not torch.equal(run(x), run(x))


def test_names_within_attention():
    traced = check(Attention(call={"need_weights": False}), self_input())
    names = [n.meta["name"] for n in traced.graph.nodes]
    assert {"mha.in_proj_weight", "mha.linear", "mha.matmul", "mha.softmax", "mha.matmul#2", "mha.out_proj"} < set(
        names
    )


class Dot(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(L, S).tril().bool()},
        {"attn_mask": torch.randn(L, S)},
    ],
)
def test_scaled_dot_product_attention(options):
    inputs = {"q": torch.randn(N, H, L, E), "k": torch.randn(N, H, S, E), "v": torch.randn(N, H, S, 5)}
    check(Dot(**options), inputs)


def test_grouped_queries():
    inputs = {"q": torch.randn(N, 4, L, E), "k": torch.randn(N, 2, S, E), "v": torch.randn(N, 2, S, E)}
    check(Dot(enable_gqa=True), inputs)


class Pool(nn.Module):
    """The attention pooling of CLIP, through the functional form."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=H,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.out.weight, out_proj_bias=self.out.bias, use_separate_proj_weight=True,
            training=self.training, need_weights=False,
        )  # fmt: skip
        return out.squeeze(0)


def test_functional_multi_head_attention():
    check(Pool(), {"x": torch.randn(N, L, E)})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(E, H, 16, activation="gelu", batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
    model = encoder if batch_first else _Swapped(encoder)
    traced = check(model, {"src": torch.randn(N, L, E)})
    assert any(n.meta["name"].endswith("layers.1.self_attn.softmax") for n in traced.graph.nodes)


class _Swapped(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, src):
        return self.encoder(src.transpose(0, 1)).transpose(0, 1)
