"""Improved clustered attention: similar queries attend as one, but each exactly to the keys that matter most to them.

Source: Vyas, Katharopoulos and Fleuret, "Fast Transformers with Clustered Attention", NeurIPS 2020 (arXiv 2007.04825),
section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.attend.clustered import attend_clusters
from scrimp.attend.grouping import Groups
from scrimp.primitives.errors import InputError


def improved_clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clusters: int = 100,
    topk: int = 32,
    bits: int = 63,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    groups: Groups | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Clustered attention with each query's own weights on its cluster's ``topk`` best keys (eqs. 9 to 11).

    With P the centroids' weights, T their best keys and m_j = sum_T P_js, a member i of cluster j gets
    ``m_j softmax(scale q_i K_T^T) V_T + sum of P_js V_s over s outside T``: never farther from softmax attention, in
    the sum of absolute differences of the weights, than plain clustered attention. ``topk`` of all keys is softmax
    attention. The gradient is that of this function with assignment and T held constant, m_j included.

    Args:
        topk: best keys a cluster; on ties the earlier key. More than there are keys means all of them.
        query, key, value, clusters, bits, iterations, generator, groups, key_lengths, query_lengths, causal, scale: as
            in `clustered_attention`.

    Returns:
        [batch, heads, queries, value dim], of the query's type.

    Raises:
        InputError: a shape, type, device or number that does not fit.
    """
    if topk < 1:
        raise InputError("topk >= 1", f"{topk}", "use clustered_attention for none")
    return attend_clusters(
        query,
        key,
        value,
        topk=topk,
        grouping={"clusters": clusters, "bits": bits, "iterations": iterations, "generator": generator},
        groups=groups,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        causal=causal,
        scale=scale,
    )
