"""Linear attention: full and causal, in time and memory that grow with the tokens and not with their square.

Source: Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention", ICML 2020 (arXiv 2006.16236).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from scrimp.attend.checks import check_attention, check_causal, repeat_heads
from scrimp.attend.feature_maps import FeatureMap, Map, elu_plus_one, identity, relu
from scrimp.attend.linear_ops import attend
from scrimp.attend.linear_twin import ELU_PLUS_ONE, IDENTITY, RELU, absent, apply_map
from scrimp.attend.precision import compute_dtype, under_autocast
from scrimp.primitives.errors import InputError

_FUSED: dict[Any, int] = {elu_plus_one: ELU_PLUS_ONE, relu: RELU, torch.relu: RELU, identity: IDENTITY}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    feature_map: FeatureMap = elu_plus_one,
    key_lengths: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Attention by a kernel that factors: ``phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) sum_j phi(k_j) + eps)`` (eq. 5).

    With ``causal`` the sums end at j = i (eq. 8). The gradient is that of the formula, ``eps`` included, derived by
    hand; it cannot be differentiated again. Sums are kept in float32 at least, whatever the type of the tensors; under
    autocast the inputs are cast as for torch's own attention.

    On CUDA, causal attention runs on flash-linear-attention where that is installed.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, key heads, keys, dim]; the key heads divide the heads (grouped-query attention).
        value: [batch, key heads, keys, value dim].
        causal: a query sees the keys up to its own place; then queries and keys are as many.
        feature_map: phi, any function on the last dimension, or a pair of them for queries and keys; their results
            should not be negative. `elu_plus_one`, `relu` and `identity` are applied inside the kernel.
        key_lengths: [batch], integers; keys from this place on do not exist. A query that sees no key gives zeros.
        eps: added to the denominators.

    Returns:
        [batch, heads, queries, value dim], of the query's type and order in memory.

    Raises:
        InputError: a shape, type or device that does not fit.
    """
    query, key, value = under_autocast(query, key, value)
    check_attention(query, key, value, key_lengths=key_lengths)
    if causal:
        check_causal(query, key)
    query, key, maps = map_features(query, key, feature_map)
    if key_lengths is not None:
        key_lengths = key_lengths.to(query.device)
    if causal and query.is_cuda and (kernel := _flash(query)) is not None:
        return _hand_over(kernel, apply_map(query, maps[0]), apply_map(key, maps[1]), value, key_lengths, eps)
    out: Tensor = attend(query, key, value, key_lengths, None, None, causal, *maps, eps)[0]
    return out


def map_features(query: Tensor, key: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Queries and keys for the operator, and the codes of the maps that it still has to apply.

    Raises:
        InputError: a map changes more than the last dimension, or the two maps' features differ in number or type.
    """
    query_map, key_map = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    queries, query_code = _mapped(query, query_map)
    keys, key_code = _mapped(key, key_map)
    if queries.shape[3] != keys.shape[3] or queries.dtype != keys.dtype:
        raise InputError(
            "feature maps with as many features of one type for queries and keys",
            f"{queries.shape[3]} {queries.dtype} and {keys.shape[3]} {keys.dtype}",
            "use maps that belong together",
        )
    return queries, keys, (query_code, key_code)


def _mapped(tensor: Tensor, function: Map) -> tuple[Tensor, int]:
    code = _FUSED.get(function)
    if code is not None:
        return tensor, code
    features = function(tensor)
    if features.dim() != 4 or features.shape[:3] != tensor.shape[:3]:
        raise InputError(
            f"features of shape {[*tensor.shape[:3], 'features']}", f"{list(features.shape)}", "map the last dimension"
        )
    return features, IDENTITY


@functools.cache
def _flash_kernel() -> Any:
    """flash-linear-attention's causal kernel, or ``None`` where the package is not installed or does not load."""
    try:
        return importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    except (ImportError, AttributeError, RuntimeError):
        return None


def _flash(query: Tensor) -> Any:
    # It refuses fewer tokens than heads (taking the layout for another one), and its numerators outgrow float16.
    if query.dtype not in (torch.float32, torch.bfloat16) or query.shape[2] < query.shape[1]:
        return None
    return _flash_kernel()


def _hand_over(
    kernel: Any, queries: Tensor, keys: Tensor, value: Tensor, key_lengths: Tensor | None, eps: float
) -> Tensor:
    """Numerators by flash-linear-attention, [batch, tokens, heads, dim] and plain autograd; denominators in float32."""
    if key_lengths is not None:
        missing = absent(key_lengths, keys.shape[2])
        keys, value = keys.masked_fill(missing, 0), value.masked_fill(missing, 0)
    keys, value = repeat_heads(keys, queries.shape[1]), repeat_heads(value, queries.shape[1])
    swapped = (tensor.transpose(1, 2) for tensor in (queries, keys, value))
    numerators, _ = kernel(*swapped, scale=1.0, normalize=False)
    wide = compute_dtype(queries.dtype)
    denominators = (queries.to(wide) * keys.to(wide).cumsum(2)).sum(-1, keepdim=True) + eps
    return (numerators.transpose(1, 2) / denominators).to(queries.dtype)
