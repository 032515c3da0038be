"""Clustered attention that sees no future: exact near by, clustered over what came before.

Queries are taken in blocks. Inside its block a query attends exactly. All earlier blocks are seen through clusters
whose centroids are means of *earlier* queries only, found anew at geometrically growing places (epochs), so that the
total work stays near linear. The two parts are joined by their masses, as in online softmax. Own design: the method
of the paper (arXiv 2007.04825) looks at future queries and keys when it groups them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.attend.causal_clustered_ops import attend
from scrimp.attend.causal_clustered_twin import epoch_starts
from scrimp.attend.checks import check_attention, check_causal
from scrimp.attend.grouping import draw_seed, group_queries
from scrimp.attend.precision import under_autocast
from scrimp.primitives.errors import InputError

BLOCK = 256


def causal_clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clusters: int = 100,
    topk: int = 32,
    bits: int = 63,
    iterations: int = 10,
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
        bits, iterations: as in `group_queries`.
        block: queries a block; those and the queries before in it are attended to exactly.
        generator: draws what `group_queries` draws; None for its fixed seed.
        key_lengths: [batch], integers; keys from this place on do not exist.
        scale: by default ``dim ** -0.5``.

    Returns:
        [batch, heads, tokens, value dim], of the query's type. Half precision is worked on in float32.

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
    seed = None if generator is None else draw_seed(generator)
    tokens = query.shape[2]
    if tokens == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    block = min(block, tokens)
    # Before the last block there are no more keys than this, and before the last epoch no more clusters.
    past = (tokens - 1) // block * block
    assignment = assign_epochs(query.detach(), clusters, block, seed, bits=bits, iterations=iterations)
    clusters = min(clusters, max(past, 1))
    return attend(query, key, value, assignment, key_lengths, clusters, min(topk, past), block, scale)[0]


def assign_epochs(
    query: Tensor, clusters: int, block: int, seed: int | None, *, bits: int = 63, iterations: int = 10
) -> Tensor:
    """Each epoch's clusters of the queries before it, [batch, heads, block + 2 block + ..]."""
    parts = [query.new_empty(*query.shape[:2], 0, dtype=torch.int64)]
    for start in epoch_starts(query.shape[2], block):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        groups = group_queries(
            query[:, :, :start], clusters=clusters, bits=bits, iterations=iterations, generator=generator
        )
        parts.append(groups.assignment)
    return torch.cat(parts, 2)
