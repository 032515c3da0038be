"""Linear attention's operators on plain tensors: the compiled kernel where it runs, the torch twin elsewhere.

float32, bfloat16 and float16 on the CPU run the kernel, in float32; float64 and other devices run the twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scrimp.attend import linear_twin as twin
from scrimp.attend.precision import compute_dtype, without_autocast
from scrimp.native import load


def _runs_native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype != torch.float64


def empty_like(tensor: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """[batch, heads, tokens, dim] like the tensor, and laid out as it is: heads beside tokens or tokens beside heads.

    A layer that splits its projection into heads by a view gets its result back as a view.
    """
    batch, heads, tokens = tensor.shape[:3]
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)
    return tensor.new_empty((batch, heads, tokens, dim), dtype=dtype)


def _float_rows(tensor: Tensor) -> Tensor:
    """float32 with numbers of a row side by side; the tensor itself where it is so already."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory order the operator promises."""
    return empty_like(like, tensor.shape[3], tensor.dtype).copy_(tensor)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, tokens, dim = query.shape
    return batch, heads, key.shape[1], tokens, key.shape[2], dim, value.shape[3]


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _lengths(key_lengths: Tensor | None) -> Tensor | None:
    return None if key_lengths is None else key_lengths.to("cpu", torch.int64).contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    kv: Tensor | None,
    normaliser: Tensor | None,
    causal: bool,
    query_map: int,
    key_map: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native = load() if _runs_native(query) else None
    maps = (query_map, key_map)
    if native is None:
        with without_autocast(query):
            out, *rest = twin.forward(query, key, value, key_lengths, kv, normaliser, causal, maps, eps)
        return _laid_out(out, query), rest[0], rest[1], rest[2]
    q, k, v = _float_rows(query), _float_rows(key), _float_rows(value)
    lengths, met, ones = _lengths(key_lengths), _floats(kv), _floats(normaliser)
    out = empty_like(query, value.shape[3], torch.float32)
    denominators = q.new_empty(q.shape[:3])
    kv_after, normaliser_after = empty_states(q, k, v)
    tensors = (q, k, v, lengths, met, ones, out, denominators, kv_after, normaliser_after)
    native.linear_forward(tuple(map(_pointer, tensors)), _strides(q, k, v, out), _sizes(q, k, v), maps, eps, causal)
    return out.to(query.dtype), denominators, kv_after, normaliser_after


def empty_states(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for S [batch, key heads, dim, value dim] and Z [batch, key heads, dim]."""
    shape = (*key.shape[:2], query.shape[3])
    wide = compute_dtype(query.dtype)
    return query.new_empty((*shape, value.shape[3]), dtype=wide), query.new_empty(shape, dtype=wide)


def forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = empty_like(query, value.shape[3])
    denominators = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return out, denominators, *empty_states(query, key, value)


def backward(
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normaliser: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    kv: Tensor | None,
    normaliser: Tensor | None,
    out: Tensor,
    denominators: Tensor,
    causal: bool,
    query_map: int,
    key_map: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    native = load() if _runs_native(query) else None
    maps, inputs = (query_map, key_map), (query, key, value)
    if native is None:
        saved = (*inputs, key_lengths, kv, normaliser, out, denominators)
        with without_autocast(query):
            found = twin.backward(grad_out, grad_kv, grad_normaliser, saved, causal, maps, eps)
        laid = [_laid_out(grad, like) for grad, like in zip(found[:3], inputs, strict=True)]
        return laid[0], laid[1], laid[2], found[3], found[4]
    q, k, v, result, grad = (_float_rows(tensor) for tensor in (*inputs, out, grad_out))
    grads = [empty_like(tensor, tensor.shape[3], torch.float32) for tensor in inputs]
    before = empty_states(q, k, v)
    # Kept in names until the kernel has run: it is handed addresses only.
    states = [_floats(tensor) for tensor in (kv, normaliser, grad_kv, grad_normaliser)]
    lengths = _lengths(key_lengths)
    tensors = (q, k, v, lengths, *states[:2], result, denominators, grad, *states[2:], *grads, *before)
    strides = _strides(q, k, v, result, grad, *grads)
    native.linear_backward(tuple(map(_pointer, tensors)), strides, _sizes(q, k, v), maps, eps, causal)
    grad_query, grad_key, grad_value = (found.to(query.dtype) for found in grads)
    return grad_query, grad_key, grad_value, *before


def backward_fake(
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normaliser: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [empty_like(tensor, tensor.shape[3]) for tensor in (query, key, value)]
    return grads[0], grads[1], grads[2], *empty_states(query, key, value)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    normaliser: Tensor,
    query_map: int,
    key_map: int,
    eps: float,
) -> Tensor:
    native = load() if _runs_native(query) and kv.is_contiguous() and normaliser.is_contiguous() else None
    if native is None or kv.dtype != torch.float32:
        with without_autocast(query):
            return twin.step(query, key, value, kv, normaliser, (query_map, key_map), eps)
    q, k, v = _float_rows(query), _float_rows(key), _float_rows(value)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    tensors = (q, k, v, kv, normaliser, out, kv, normaliser)
    native.linear_step(
        tuple(map(_pointer, tensors)), _strides(q, k, v, out), _sizes(q, k, v), (query_map, key_map), eps
    )
    return out.to(query.dtype)


def step_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
