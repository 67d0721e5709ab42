"""Attention in operators that a plan knows: linear, reshape, transpose, matmul, softmax.

The functions equal torch's of the same names and are what a traced model runs instead of them, for torch's own are
one opaque step each. Heads are split off the last dimension and batch stays first, so no size of the batch is read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend: softmax(query · keyᵀ · scale + mask) · value, as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: Broadcast to (..., L, S); boolean (True takes part) or added.
        dropout_p: Probability of dropping an attention weight, in evaluation too.
        is_causal: Position i attends to positions up to i.
        scale: Factor of the products; None for 1/√E.
        enable_gqa: Key and value have fewer heads (third last dimension) than the query, each serving several.

    Returns:
        (..., L, Ev).
    """
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if is_causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        attn_mask = allowed if attn_mask is None else attn_mask
    mask = None if attn_mask is None else _additive(attn_mask, query.dtype, blocked=False)
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    weights = _attention_weights(query, key, factor, mask)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p, training=True)
    return weights @ value


def multi_head_attention_module(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for `torch.nn.MultiheadAttention.forward`, with the same arguments and results."""
    packed = module._qkv_same_embed_dim
    return _multi_head_attention(
        query,
        key,
        value,
        heads=module.num_heads,
        batch_first=module.batch_first,
        in_weight=module.in_proj_weight if packed else None,
        in_weights=None if packed else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight),
        in_bias=module.in_proj_bias,
        extra=None if module.bias_k is None else (module.bias_k, module.bias_v),
        add_zero_attn=module.add_zero_attn,
        dropout_p=module.dropout,
        training=module.training,
        project_out=module.out_proj,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        is_causal=is_causal,
        average=average_attn_weights,
    )


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for `torch.nn.functional.multi_head_attention_forward`, with the same arguments and results."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("static keys and values in multi_head_attention_forward")
    if query.size(-1) != embed_dim_to_check:
        raise ValueError(f"the embedding has {query.size(-1)} channels and not {embed_dim_to_check}")
    return _multi_head_attention(
        query,
        key,
        value,
        heads=num_heads,
        batch_first=False,
        in_weight=None if use_separate_proj_weight else in_proj_weight,
        in_weights=(q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
        in_bias=in_proj_bias,
        extra=None if bias_k is None else (bias_k, bias_v),
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p,
        training=training,
        project_out=lambda x: F.linear(x, out_proj_weight, out_proj_bias),
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        is_causal=is_causal,
        average=average_attn_weights,
    )


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    batch_first: bool,
    in_weight: Any,
    in_weights: Any,
    in_bias: Any,
    extra: Any,
    add_zero_attn: bool,
    dropout_p: float,
    training: bool,
    project_out: Any,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    if is_causal and attn_mask is None:
        raise RuntimeError("need attn_mask if specifying the is_causal hint")
    query, key, value, swap = _batch_first(query, key, value, batch_first)
    batched = query.dim() == 3
    q, k, v = _project_in(query, key, value, in_weight, in_weights, in_bias)
    mask = _merged_mask(attn_mask, key_padding_mask, heads, batched, q.dtype)
    if extra is not None:
        k, v = (_append(x, more.squeeze(0)) for x, more in zip((k, v), extra, strict=True))
        mask = None if mask is None else F.pad(mask, (0, 1))
    if add_zero_attn:
        k, v = (_append(x, torch.zeros(1, x.size(-1), dtype=x.dtype, device=x.device)) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    q, k, v = (_split_heads(x, heads) for x in (q, k, v))
    weights = _attention_weights(q, k, 1 / math.sqrt(q.size(-1)), mask)
    weights = F.dropout(weights, dropout_p, training=training)
    out = project_out((weights @ v).transpose(-3, -2).flatten(-2))
    if swap:
        out = out.transpose(0, 1)
    if not need_weights:
        return out, None
    return out, weights.mean(-3) if average else weights


def _batch_first(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> tuple[Any, Any, Any, bool]:
    if batch_first or query.dim() == 2:
        return query, key, value, False
    # what is the same object stays the same object: self-attention is projected at once
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = q if value is query else k if value is key else value.transpose(0, 1)
    return q, k, v, True


def _project_in(
    query: Tensor, key: Tensor, value: Tensor, weight: Any, weights: Any, bias: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if weights is None and query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return q, k, v
    parts = weight.chunk(3) if weights is None else weights
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))
    return q, k, v


def _split_heads(sequence: Tensor, heads: int) -> Tensor:
    """Turn (..., S, heads * E) into (..., heads, S, E)."""
    return torch.unflatten(sequence, -1, (heads, -1)).transpose(-3, -2)


def _append(sequence: Tensor, row: Tensor) -> Tensor:
    """Append one position to (S, E) or (N, S, E)."""
    if sequence.dim() == 3:
        row = row.unsqueeze(0).expand(sequence.size(0), -1, -1)
    return torch.cat([sequence, row], dim=-2)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, batched: bool, dtype: torch.dtype
) -> Tensor | None:
    """One additive mask that broadcasts to (N, heads, L, S), or (heads, L, S) without a batch."""
    mask = None if attn_mask is None else _additive(attn_mask, dtype, blocked=True)
    if mask is not None and mask.dim() == 3 and batched:
        mask = torch.unflatten(mask, 0, (-1, heads))
    if key_padding_mask is None:
        return mask
    padding = _additive(key_padding_mask, dtype, blocked=True)
    padding = padding.unsqueeze(1).unsqueeze(2) if batched else padding.unsqueeze(0).unsqueeze(1)
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, dtype: torch.dtype, *, blocked: bool) -> Tensor:
    """What a mask adds to the products; `blocked` says what True means in a boolean one."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask if blocked else ~mask, -math.inf)


def _attention_weights(query: Tensor, key: Tensor, factor: float, mask: Tensor | None) -> Tensor:
    scores = (query * factor) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return F.softmax(scores, dim=-1)
