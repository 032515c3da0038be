"""Softmax attention, the baseline: torch's fused kernels behind the family's signature."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scrimp.attend.checks import check_attention, check_causal, length_mask, repeat_heads
from scrimp.attend.precision import under_autocast


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention as everybody has it: ``softmax(scale query key^T) value``; quadratic in the number of tokens.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, key heads, keys, dim]; the key heads divide the heads (grouped-query attention).
        value: [batch, key heads, keys, value dim].
        causal: a query sees the keys up to its own place; then queries and keys are as many.
        key_lengths: [batch], integers; keys from this place on do not exist. A query that sees no key gives zeros.
        scale: by default ``dim ** -0.5``.

    Returns:
        [batch, heads, queries, value dim], of the query's type.

    Raises:
        InputError: a shape, type or device that does not fit.
    """
    query, key, value = under_autocast(query, key, value)
    check_attention(query, key, value, key_lengths=key_lengths)
    if causal:
        check_causal(query, key)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if key_lengths is None:
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    mask = length_mask(key_lengths, key.shape[2])[:, None, None, :]
    if causal:
        mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    # A row without keys must not be shown to softmax: its gradient would be NaN even where the output is replaced.
    empty = ~mask.any(-1, keepdim=True)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask | empty, scale=scale)
    return out.masked_fill(empty, 0.0)
