"""Clustered attention: similar queries attend as one.

Source: Vyas, Katharopoulos and Fleuret, "Fast Transformers with Clustered Attention", NeurIPS 2020 (arXiv 2007.04825).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.attend.causal_clustered import causal_clustered_attention
from scrimp.attend.checks import check_attention, check_causal
from scrimp.attend.clustered_ops import attend
from scrimp.attend.grouping import Groups, group_queries
from scrimp.attend.precision import under_autocast
from scrimp.primitives.errors import InputError


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clusters: int = 100,
    bits: int = 63,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    groups: Groups | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Each query gets the softmax attention of the mean query of its cluster (eqs. 3 to 6); linear in the tokens.

    The gradient is that of this function with the assignment held constant. Half precision is worked on in float32;
    under autocast the inputs are cast as for torch's own attention.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, key heads, keys, dim]; the key heads divide the heads (grouped-query attention).
        value: [batch, key heads, keys, value dim].
        clusters, bits, iterations, generator: as in `group_queries`.
        groups: clusters made before, by `group_queries`, for as many queries; then those four are not used.
        key_lengths: [batch], integers; keys from this place on do not exist. Without keys the output is 0.
        query_lengths: [batch], integers; queries from this place on are padding: they give zeros, and change nothing.
        causal: a query sees the keys up to its own place, see `causal_clustered_attention`; then queries and keys are
            as many, and neither ``groups`` nor ``query_lengths`` is taken.
        scale: by default ``dim ** -0.5``.

    Returns:
        [batch, heads, queries, value dim], of the query's type.

    Raises:
        InputError: a shape, type, device or number that does not fit.
    """
    return attend_clusters(
        query,
        key,
        value,
        topk=0,
        grouping={"clusters": clusters, "bits": bits, "iterations": iterations, "generator": generator},
        groups=groups,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        causal=causal,
        scale=scale,
    )


def attend_clusters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int,
    grouping: dict[str, object],
    groups: Groups | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Clustered attention (topk 0) and improved clustered attention after their arguments."""
    query, key, value = under_autocast(query, key, value)
    check_attention(query, key, value, key_lengths=key_lengths)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if causal:
        _check_causal(query, key, groups, query_lengths)
        return causal_clustered_attention(
            query,
            key,
            value,
            topk=topk,
            key_lengths=key_lengths,
            scale=scale,
            **grouping,  # type: ignore[arg-type]
        )
    if groups is None:
        groups = group_queries(query, query_lengths=query_lengths, **grouping)  # type: ignore[arg-type]
    elif query_lengths is not None:
        raise InputError(
            "query_lengths or groups", "both", "give the lengths to group_queries: the groups know the padding"
        )
    if groups.assignment.shape != query.shape[:3] or groups.assignment.device != query.device:
        raise InputError(
            f"groups of {list(query.shape[:3])} queries on {query.device}",
            f"{list(groups.assignment.shape)} on {groups.assignment.device}",
            "group these queries",
        )
    topk = min(topk, key.shape[2])
    return attend(query, key, value, groups.assignment, key_lengths, groups.clusters, topk, scale)[0]


def _check_causal(query: Tensor, key: Tensor, groups: Groups | None, query_lengths: Tensor | None) -> None:
    check_causal(query, key)
    if groups is not None or query_lengths is not None:
        raise InputError(
            "neither groups nor query_lengths with causal=True",
            "one of them",
            "leave them out: causal groups are made of earlier queries, and later padding changes nothing before it",
        )
