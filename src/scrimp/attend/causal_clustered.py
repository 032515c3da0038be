"""Clustered attention that sees no future: exact near by, clustered over what came before.

Queries are taken in blocks. Inside its block a query attends exactly. All earlier blocks are seen through clusters
whose centroids are means of *earlier* queries only, found anew at geometrically growing places (epochs), so that the
total work stays near linear. The two parts are joined by their masses, as in online softmax. Own design: the method
of the paper (arXiv 2007.04825) looks at future queries and keys when it groups them.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.attend.autocast import under_autocast, without_autocast
from scrimp.attend.checks import check_attention, check_causal, length_mask, repeat_heads
from scrimp.attend.clustered_twin import top_keys
from scrimp.attend.grouping import group_queries
from scrimp.attend.grouping_ops import compute_dtype, count_by_cluster, sum_by_cluster
from scrimp.primitives.errors import InputError

BLOCK = 256


def causal_clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clusters: int = 100,
    topk: int = 32,
    block: int = BLOCK,
    generator: torch.Generator | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal (improved) clustered attention: changing tokens from place t on changes nothing before t, to the bit.

    For a query of block b, with c the nearest of the centroids known then, P_c its weights over the keys of the blocks
    before b, T_c its ``topk`` best of them and m_c their mass: the past gives
    ``m_c softmax(scale q K_T^T) V_T + sum of P_cs V_s over s outside T`` with the log-mass ``lse_T(q) - log m_c``
    (the mass the query itself gives T, extrapolated by the centroid's share of it; ``lse_c`` for ``topk`` 0), the own
    block its exact softmax with its own log-mass; both are averaged by these masses. No row is ever empty, and with
    ``topk`` >= tokens the result is causal softmax attention. Centroids are found at the tokens block, 2 block,
    4 block, ... from all queries before; the gradient holds assignments and best keys constant.

    Args:
        query: [batch, heads, tokens, dim].
        key: [batch, key heads, tokens, dim]; the key heads divide the heads.
        value: [batch, key heads, tokens, value dim].
        clusters: at most this many clusters.
        topk: exact keys of the past a query; 0 for plain clustered attention.
        block: queries a block; those and the queries before in it are attended to exactly.
        generator: draws what `group_queries` draws; None for its fixed seed.
        key_lengths: [batch], integers; keys from this place on do not exist.
        scale: by default ``dim ** -0.5``.

    Returns:
        [batch, heads, tokens, value dim], of the query's type. Without a compiled kernel: torch's products throughout.

    Raises:
        InputError: a shape, type, device or number that does not fit.
    """
    if clusters < 1 or topk < 0 or block < 1:
        raise InputError("clusters and block >= 1, topk >= 0", f"{clusters}, {block}, {topk}", "change that number")
    query, key, value = under_autocast(query, key, value)
    check_attention(query, key, value, key_lengths=key_lengths)
    check_causal(query, key)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    # One draw a call: every epoch groups with the same hyperplanes, so the number of epochs cannot shift later draws.
    seed = None if generator is None else int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    dtype, tokens, heads = compute_dtype(query.dtype), query.shape[2], query.shape[1]
    real = None if key_lengths is None else length_mask(key_lengths, tokens)[:, None, None, :]
    with without_autocast(query):
        keys, values = (repeat_heads(tensor.to(dtype), heads) for tensor in (key, value))
        parts = _blocks(query.to(dtype) * scale, keys, values, real, _Plan(clusters, topk, block, seed))
        return torch.cat(parts, 2).to(query.dtype) if parts else query.new_zeros(*query.shape[:3], value.shape[3])


class _Plan(NamedTuple):
    clusters: int
    topk: int
    block: int
    seed: int | None


def _blocks(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, plan: _Plan) -> list[Tensor]:
    """The output block by block; queries are scaled, real is [batch, 1, 1, tokens] or None."""
    parts, past, tokens = [], None, query.shape[2]
    for start in range(0, tokens, plan.block):
        here, before = slice(start, min(start + plan.block, tokens)), slice(0, start)
        near = _exact_causal(query[:, :, here], key[:, :, here], value[:, :, here], _columns(real, here))
        if start == 0:
            parts.append(near.out)
            continue
        if past is None or start >= 2 * past.since:
            past = _Past(query[:, :, before], value.shape[3], plan)
            past.see(key[:, :, before], value[:, :, before], _columns(real, before))
        parts.append(_join(near, past.attend(query[:, :, here], key, value)))
        past.see(key[:, :, here], value[:, :, here], _columns(real, here))
    return parts


class _Part(NamedTuple):
    """Attention over some of the keys: out [.., queries, value dim], already divided, and the log of its mass."""

    out: Tensor
    lse: Tensor


def _columns(real: Tensor | None, here: slice) -> Tensor | None:
    return None if real is None else real[..., here]


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse of the last dimension; zeros and -inf where every logit is -inf, without NaN in the gradient."""
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    safe = logits.masked_fill(empty, 0.0)
    lse = safe.logsumexp(-1, keepdim=True)
    return (safe - lse).exp().masked_fill(empty, 0.0), lse.masked_fill(empty, float("-inf"))[..., 0]


def _exact_causal(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> _Part:
    ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    logits = (query @ key.mT).masked_fill(ahead, float("-inf"))
    if real is not None:
        logits = logits.masked_fill(~real, float("-inf"))
    weights, lse = _softmax(logits)
    return _Part(weights @ value, lse)


def _join(near: _Part, far: _Part) -> Tensor:
    """Both parts by their masses; 0 where both are empty."""
    masses, _ = _softmax(torch.stack((near.lse, far.lse), -1))
    return masses[..., :1] * near.out + masses[..., 1:] * far.out


class _Past:
    """Earlier tokens as clusters of earlier queries: running softmax statistics and best keys of each centroid."""

    def __init__(self, scaled: Tensor, value_dim: int, plan: _Plan) -> None:
        generator = None if plan.seed is None else torch.Generator().manual_seed(plan.seed)
        groups = group_queries(scaled, clusters=plan.clusters, generator=generator)
        counts = count_by_cluster(groups.assignment, groups.assignment >= 0, groups.clusters)
        self.since, self.topk = scaled.shape[2], plan.topk
        self.empty = counts == 0
        sums = sum_by_cluster(scaled, groups.assignment, groups.clusters)
        self.centroids = sums / counts.clamp_min(1)[..., None]
        self.part = _Part(scaled.new_zeros(*counts.shape, value_dim), scaled.new_full(counts.shape, float("-inf")))
        self.top = groups.assignment.new_zeros(*counts.shape, 0)
        self.top_logits = scaled.new_zeros(*counts.shape, 0)
        self.seen = 0

    def see(self, key: Tensor, value: Tensor, real: Tensor | None) -> None:
        """Takes in the next keys [.., tokens, dim] and their values."""
        logits = self.centroids @ key.mT
        if real is not None:
            logits = logits.masked_fill(~real, float("-inf"))
        weights, lse = _softmax(logits)
        _, both = _softmax(torch.stack((self.part.lse, lse), -1))
        self.part = _Part(_join(self.part, _Part(weights @ value, lse)), both)
        self._rank(logits.detach())
        self.seen += key.shape[2]

    def _rank(self, logits: Tensor) -> None:
        """The best keys so far are the best of the former ones and the new: places in their concatenation, in order."""
        places = torch.arange(self.seen, self.seen + logits.shape[-1], device=logits.device)
        places = torch.cat((self.top, places.expand(logits.shape)), -1)
        logits = torch.cat((self.top_logits, logits), -1)
        chosen = top_keys(logits, min(self.topk, logits.shape[-1]))
        absent = chosen < 0
        self.top = places.gather(-1, chosen.clamp_min(0)).masked_fill(absent, 0)
        self.top_logits = logits.gather(-1, chosen.clamp_min(0)).masked_fill(absent, float("-inf"))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> _Part:
        """The past as the scaled queries [.., block, dim] see it; key and value are all tokens', [.., tokens, dim]."""
        half = self.centroids.detach().square().sum(-1).div(2).masked_fill(self.empty, float("inf"))
        nearest = (query.detach() @ self.centroids.detach().mT - half[:, :, None]).argmax(-1)
        if self.topk == 0:
            return _Part(_pick(self.part.out, nearest), _pick(self.part.lse, nearest))
        keys, values = _pick(key, self.top.flatten(2)), _pick(value, self.top.flatten(2))
        keys, values = (rows.unflatten(2, self.top.shape[2:]) for rows in (keys, values))
        absent = self.top_logits == float("-inf")
        mass_of = (keys @ self.centroids[..., None])[..., 0] - _finite(self.part.lse)[..., None]
        shares = mass_of.exp().masked_fill(absent, 0.0)
        bottom = self.part.out - (shares[..., None, :] @ values)[..., 0, :]
        mass = shares.sum(-1)
        logits = (_pick(keys, nearest) @ query[..., None])[..., 0]
        weights, lse = _softmax(logits.masked_fill(_pick(absent, nearest), float("-inf")))
        exact = (weights[..., None, :] @ _pick(values, nearest))[..., 0, :]
        known = _pick(mass, nearest)
        log_mass = known.masked_fill(known == 0, 1.0).log()
        return _Part(known[..., None] * exact + _pick(bottom, nearest), lse - log_mass)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _pick(rows: Tensor, places: Tensor) -> Tensor:
    """rows [batch, heads, count, ...] at places [batch, heads, n]; whole rows are copied, which gather does not do."""
    pairs, count, rest = rows.shape[0] * rows.shape[1], rows.shape[2], rows.shape[3:]
    first = count * torch.arange(pairs, device=places.device).view(*rows.shape[:2], 1)
    picked = rows.reshape(pairs * count, prod(rest)).index_select(0, (places + first).flatten())
    return picked.view(*places.shape, *rest)
