"""What every attention asks of its tensors: [batch, heads, tokens, dim], and keys that may end early."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


def check_attention(query: Tensor, key: Tensor, value: Tensor, *, key_lengths: Tensor | None = None) -> None:
    """Refuse tensors that no attention can take.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, key heads, keys, dim]; the key heads divide the heads (grouped-query attention).
        value: [batch, key heads, keys, value dim].
        key_lengths: [batch], integers; keys from this place on do not exist.

    Raises:
        InputError: a shape, type or device that does not fit, and which.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise InputError(f"{name} of shape [batch, heads, tokens, dim]", f"{list(tensor.shape)}", "reshape it")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise InputError(
                f"{name} like the query, {query.dtype} on {query.device}",
                f"{tensor.dtype} on {tensor.device}",
                "move or cast it",
            )
    if not query.is_floating_point():
        raise InputError("floating-point tensors", f"{query.dtype}", "cast them")
    wanted = (query.shape[0], key.shape[1], key.shape[2])
    if tuple(value.shape[:3]) != wanted or key.shape[0] != query.shape[0]:
        raise InputError(
            "key and value with the query's batch and the same heads and tokens",
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}",
            "pass tensors of one batch",
        )
    if key.shape[3] != query.shape[3]:
        raise InputError(f"keys of the query's dim, {query.shape[3]}", f"{key.shape[3]}", "project them alike")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise InputError(
            "key heads that divide the heads", f"{key.shape[1]} and {query.shape[1]}", "repeat or drop key heads"
        )
    if key_lengths is not None:
        check_lengths(key_lengths, batch=query.shape[0], name="key_lengths")


def check_lengths(lengths: Tensor, *, batch: int, name: str) -> None:
    """Refuse lengths that are not one whole number an element of the batch."""
    if tuple(lengths.shape) != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(
            f"{name} as whole numbers of shape [{batch}]", f"{lengths.dtype} {list(lengths.shape)}", "pass one a sample"
        )


def check_causal(query: Tensor, key: Tensor) -> None:
    """Causal attention is defined here for as many queries as keys."""
    if query.shape[2] != key.shape[2]:
        raise InputError(
            "as many queries as keys for causal attention",
            f"{query.shape[2]} and {key.shape[2]}",
            "use linear_attention_step to go on from a prefix",
        )


def length_mask(lengths: Tensor, tokens: int) -> Tensor:
    """[batch, tokens], True where a token exists."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, key heads, tokens, dim] with ``heads`` heads: each key head's copy for its run of query heads."""
    batch, key_heads, tokens, dim = tensor.shape
    if key_heads == heads:
        return tensor
    shape = (batch, key_heads, heads // key_heads, tokens, dim)
    return tensor[:, :, None].expand(shape).reshape(batch, heads, tokens, dim)
