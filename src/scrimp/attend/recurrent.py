"""Linear attention as a recurrent network: a state of fixed size, a token or a chunk of tokens at a time.

Causal linear attention is the recurrence ``S_i = S_{i-1} + phi(k_i) v_i^T``, ``Z_i = Z_{i-1} + phi(k_i)``, with the
output ``phi(q_i) S_i / (phi(q_i) Z_i + eps)`` (Katharopoulos et al., ICML 2020, eq. 16-20). A prompt is read in chunks
at the parallel form's speed; then each token costs the same, however many came before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.attend.checks import check_attention, check_causal
from scrimp.attend.feature_maps import FeatureMap, elu_plus_one
from scrimp.attend.linear import map_features
from scrimp.attend.linear_kernel import empty_states
from scrimp.attend.linear_ops import attend, step
from scrimp.attend.precision import compute_dtype, under_autocast
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights


@dataclass(frozen=True)
class LinearState:
    """What a layer of linear attention remembers of the tokens it has seen.

    Attributes:
        kv: sum of ``phi(k) v^T``, [batch, key heads, features, value dim]; float32 or wider.
        normaliser: sum of ``phi(k)``, [batch, key heads, features]; of the same type.
    """

    kv: Tensor
    normaliser: Tensor


def linear_attention_step(
    state: LinearState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 1e-6,
) -> tuple[LinearState, Tensor]:
    """Go on by one token, or by a chunk of tokens that see one another causally.

    Steps and chunks of any lengths give what causal `linear_attention` gives on all tokens together. Gradients flow
    through the output and through the state.

    Args:
        state: of the tokens so far, left as it is; ``None`` at the start.
        query: [batch, heads, tokens, dim].
        key: [batch, key heads, tokens, dim].
        value: [batch, key heads, tokens, value dim].
        feature_map: as for `linear_attention`.
        eps: as for `linear_attention`.

    Returns:
        The state after the tokens, and the outputs [batch, heads, tokens, value dim].

    Raises:
        InputError: a shape, type or device that does not fit, the state's included.
    """
    query, key, value = under_autocast(query, key, value)
    query, key, maps = _checked(state, query, key, value, feature_map)
    before = (None, None) if state is None else (state.kv, state.normaliser)
    if query.shape[2] == 1 and not (torch.is_grad_enabled() and _wants_gradient(query, key, value, *before)):
        after = _fresh(state, query, key, value)
        return after, step(query, key, value, after.kv, after.normaliser, *maps, eps)
    out, _, kv, normaliser = attend(query, key, value, None, *before, True, *maps, eps)
    return LinearState(kv, normaliser), out


def linear_attention_step_(
    state: LinearState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 1e-6,
) -> Tensor:
    """`linear_attention_step` that writes the new state over the old one and returns the outputs alone.

    For generation: no memory is taken beyond the output. It records no gradient.

    Args:
        state: of the tokens so far; changed. `empty_state` makes the first.

    Raises:
        InputError: as `linear_attention_step`; or a tensor would want its gradient.
    """
    if torch.is_grad_enabled() and _wants_gradient(query, key, value, state.kv, state.normaliser):
        raise InputError(
            "tensors without gradient to update a state in place",
            "some that require it",
            "call it under torch.no_grad, or use linear_attention_step",
        )
    query, key, value = under_autocast(query, key, value)
    query, key, maps = _checked(state, query, key, value, feature_map)
    if query.shape[2] == 1:
        return step(query, key, value, state.kv, state.normaliser, *maps, eps)
    out, _, kv, normaliser = attend(query, key, value, None, state.kv, state.normaliser, True, *maps, eps)
    state.kv.copy_(kv)
    state.normaliser.copy_(normaliser)
    return out


def empty_state(key: Tensor, value: Tensor, *, features: int | None = None) -> LinearState:
    """The state before any token, for keys and values of these batch, heads, dims, type and device.

    Args:
        key: [batch, key heads, tokens, dim]; the tokens do not matter.
        value: [batch, key heads, tokens, value dim].
        features: what the feature map makes of dim, where it changes it.
    """
    wide = compute_dtype(key.dtype)
    shape = (*key.shape[:2], key.shape[3] if features is None else features)
    return LinearState(key.new_zeros((*shape, value.shape[3]), dtype=wide), key.new_zeros(shape, dtype=wide))


def save_state(state: LinearState | Sequence[LinearState], path: str | os.PathLike[str]) -> None:
    """Write a state, or a sequence of them (one a layer), as safetensors; the file is whole or absent.

    Raises:
        OSError: the folder cannot be written.
    """
    layers = [state] if isinstance(state, LinearState) else list(state)
    tensors = {}
    for index, layer in enumerate(layers):
        tensors[f"{index}.kv"] = layer.kv.detach()
        tensors[f"{index}.normaliser"] = layer.normaliser.detach()
    kept = {"layers": len(layers), "single": isinstance(state, LinearState)}
    write_atomic(path, pack_weights(tensors, {"scrimp_linear_state": json.dumps(kept, sort_keys=True)}))


def load_state(path: str | os.PathLike[str]) -> LinearState | list[LinearState]:
    """Read what `save_state` wrote, onto the CPU: a state where it was given one, else a list.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    remedy = "pass a file that save_state wrote"
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("scrimp_linear_state", "null"))
            if kept is None:
                raise InputError("a file of linear attention states", f"{os.fspath(path)}, which has none", remedy)
            layers = [
                LinearState(file.get_tensor(f"{index}.kv"), file.get_tensor(f"{index}.normaliser"))
                for index in range(kept["layers"])
            ]
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError("a whole file of linear attention states", f"{os.fspath(path)}: {error}", remedy) from error
    return layers[0] if kept["single"] else layers


def _checked(
    state: LinearState | None, query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Features and codes of their maps, once everything fits together, the state included."""
    check_attention(query, key, value)
    check_causal(query, key)
    query, key, maps = map_features(query, key, feature_map)
    if state is None:
        return query, key, maps
    shape, wide = (*key.shape[:2], key.shape[3]), compute_dtype(query.dtype)
    expected = ((*shape, value.shape[3]), shape)
    for name, tensor, size in zip(("kv", "normaliser"), (state.kv, state.normaliser), expected, strict=True):
        if tuple(tensor.shape) != size or tensor.dtype != wide or tensor.device != query.device:
            raise InputError(
                f"a state whose {name} is {wide} {list(size)} on {query.device}",
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}",
                "pass the state that the same layer's last step returned",
            )
    return query, key, maps


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _fresh(state: LinearState | None, query: Tensor, key: Tensor, value: Tensor) -> LinearState:
    """A copy of the state that may be written over."""
    if state is not None:
        packed = torch.contiguous_format
        return LinearState(state.kv.clone(memory_format=packed), state.normaliser.clone(memory_format=packed))
    kv, normaliser = empty_states(query, key, value)
    return LinearState(kv.zero_(), normaliser.zero_())
