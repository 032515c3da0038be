"""Linear attention in torch, forward and backward: what runs on any device and type, and the compiled kernel's twin.

The equations stand in ``native/src/linear_attention.hpp``. Here every chunk of tokens is worked on at once: beside the
result there are one state a chunk and one triangle of scores a chunk, both O(tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.attend.checks import length_mask
from scrimp.attend.feature_maps import elu_plus_one
from scrimp.attend.precision import compute_dtype

CHUNK = 64
IDENTITY, ELU_PLUS_ONE, RELU = 0, 1, 2


def apply_map(x: Tensor, code: int) -> Tensor:
    if code == ELU_PLUS_ONE:
        return elu_plus_one(x)
    return x.relu() if code == RELU else x


def slope(mapped: Tensor, code: int) -> Tensor:
    """d map(x) / dx, told from map(x)."""
    if code == ELU_PLUS_ONE:
        return mapped.clamp_max(1)
    return (mapped > 0).to(mapped.dtype) if code == RELU else torch.ones_like(mapped)


@dataclass(frozen=True)
class _Tiles:
    """Tensors cut into chunks, [batch, key heads, group, chunks, chunk, ...]; keys' group is 1."""

    queries: Tensor  # phi(q)
    keys: Tensor  # phi(k), zeros where there is no key
    values: Tensor  # v with a last column of ones
    causal: bool

    @staticmethod
    def cut(tensor: Tensor, key_heads: int, size: int) -> Tensor:
        batch, heads, tokens, dim = tensor.shape
        chunks = max(1, -(-tokens // size))  # no tokens make one chunk of zeros
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, chunks * size - tokens))
        return padded.reshape(batch, key_heads, heads // key_heads, chunks, size, dim)

    @staticmethod
    def join(tensor: Tensor, like: Tensor) -> Tensor:
        """Chunks back to a tensor shaped like this one, its last dimension apart."""
        batch, heads, tokens = like.shape[:3]
        rows = tensor.shape[3] * tensor.shape[4]
        return tensor.reshape(batch, heads, rows, tensor.shape[-1])[:, :, :tokens]

    def triangle(self, scores: Tensor) -> Tensor:
        return scores.tril() if self.causal else scores


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, maps: tuple[int, int], causal: bool
) -> _Tiles:
    wide, key_heads = compute_dtype(query.dtype), key.shape[1]
    queries, keys = apply_map(query.to(wide), maps[0]), apply_map(key.to(wide), maps[1])
    values = torch.nn.functional.pad(value.to(wide), (0, 1), value=1.0)
    if key_lengths is not None:
        missing = absent(key_lengths, key.shape[2])
        keys, values = keys.masked_fill(missing, 0), values.masked_fill(missing, 0)
    sizes = [CHUNK if causal else max(1, tensor.shape[2]) for tensor in (query, key)]
    return _Tiles(
        _Tiles.cut(queries, key_heads, sizes[0]),
        _Tiles.cut(keys, key_heads, sizes[1]),
        _Tiles.cut(values, key_heads, sizes[1]),
        causal,
    )


def absent(key_lengths: Tensor, tokens: int) -> Tensor:
    """[batch, 1, tokens, 1], True where there is no key."""
    return ~length_mask(key_lengths, tokens)[:, None, :, None]


def _packed(kv: Tensor | None, normaliser: Tensor | None, like: Tensor) -> Tensor:
    """S with Z as its last column, [batch, key heads, 1, 1, dim, value dim + 1]; zeros for none."""
    if kv is None or normaliser is None:
        return torch.zeros_like(like[:, :, :, :1])
    return torch.cat([kv, normaliser.unsqueeze(-1)], -1)[:, :, None, None].to(like.dtype)


def _running(sums: Tensor, start: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The states [..., chunks, dim, value dim + 1] that the chunks meet, and the state after all of them."""
    if not causal:
        total = start + sums.sum(3, keepdim=True)
        return total, total
    states = torch.cat([start, sums], 3).cumsum(3)
    return states[:, :, :, :-1], states[:, :, :, -1:]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    kv: Tensor | None,
    normaliser: Tensor | None,
    causal: bool,
    maps: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [batch, heads, queries, value dim], denominators [batch, heads, queries], and S and Z after all keys."""
    tiles = _tiles(query, key, value, key_lengths, maps, causal)
    sums = tiles.keys.mT @ tiles.values
    states, last = _running(sums, _packed(kv, normaliser, sums), causal)
    numerators = tiles.queries @ states
    if causal:
        numerators = numerators + (tiles.queries @ tiles.keys.mT).tril() @ tiles.values
    joined = _Tiles.join(numerators, query)
    out, denominators = joined[..., :-1] / (joined[..., -1:] + eps), joined[..., -1]
    after = last[:, :, 0, 0]
    return out.to(query.dtype), denominators.contiguous(), after[..., :-1].contiguous(), after[..., -1].contiguous()


def backward(
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normaliser: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor],
    causal: bool,
    maps: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of S and Z before; ``saved`` is what the operator's backward takes."""
    query, key, value, key_lengths, kv, normaliser, out, denominators = saved
    tiles = _tiles(query, key, value, key_lengths, maps, causal)
    grads = _Tiles.cut(_row_gradients(grad_out, out, denominators, eps), key.shape[1], tiles.queries.shape[4])
    sums = tiles.keys.mT @ tiles.values
    met = _packed(kv, normaliser, sums)
    states = _running(sums, met, causal)[0] if causal else met
    back = (tiles.queries.mT @ grads).sum(2, keepdim=True)
    reverse, first = _running(back.flip(3), _packed(grad_kv, grad_normaliser, back), causal)
    reverse = reverse.flip(3)
    grad_queries, grad_keys = grads @ states.mT, tiles.values @ reverse.mT
    grad_values = tiles.keys @ reverse
    if causal:
        weights = (grads @ tiles.values.mT).tril()
        scores = (tiles.queries @ tiles.keys.mT).tril()
        grad_queries = grad_queries + weights @ tiles.keys
        grad_keys = grad_keys + (weights.mT @ tiles.queries).sum(2, keepdim=True)
        grad_values = grad_values + (scores.mT @ grads).sum(2, keepdim=True)
    grad_query = _Tiles.join(grad_queries * slope(tiles.queries, maps[0]), query)
    grad_key = _Tiles.join(grad_keys * slope(tiles.keys, maps[1]), key)
    grad_value = _Tiles.join(grad_values[..., :-1], value)
    if key_lengths is not None:
        missing = absent(key_lengths, key.shape[2])
        grad_key, grad_value = grad_key.masked_fill(missing, 0), grad_value.masked_fill(missing, 0)
    before = first[:, :, 0, 0]
    types = (query.dtype, key.dtype, value.dtype)
    gradients = [grad.to(kind) for grad, kind in zip((grad_query, grad_key, grad_value), types, strict=True)]
    return gradients[0], gradients[1], gradients[2], before[..., :-1].contiguous(), before[..., -1].contiguous()


def _row_gradients(grad_out: Tensor, out: Tensor, denominators: Tensor, eps: float) -> Tensor:
    """g and, as a last column, dz."""
    wide = denominators.dtype
    grads = grad_out.to(wide)
    both = torch.cat([grads, -(grads * out.to(wide)).sum(-1, keepdim=True)], -1)
    return both / (denominators.unsqueeze(-1) + eps)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    normaliser: Tensor,
    maps: tuple[int, int],
    eps: float,
) -> Tensor:
    """One token, [batch, heads, 1, ...]: adds it to S and Z in place and gives the output."""
    wide = kv.dtype
    keys, values = apply_map(key.to(wide), maps[1]), value.to(wide)
    kv.addcmul_(keys.mT, values)
    normaliser.add_(keys.squeeze(2))
    batch, heads, _, dim = query.shape
    queries = apply_map(query.to(wide), maps[0]).reshape(batch, kv.shape[1], heads // kv.shape[1], dim)
    out = (queries @ kv) / (queries @ normaliser.unsqueeze(-1) + eps)
    return out.reshape(batch, heads, 1, value.shape[3]).to(query.dtype)
