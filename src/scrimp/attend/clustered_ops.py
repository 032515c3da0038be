"""Clustered attention as operators with gradients: compiled kernels on the CPU, torch twins everywhere else."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scrimp.attend.clustered_twin import Saved, backward_twin, forward_twin
from scrimp.attend.grouping_ops import group, kernels_for, packed
from scrimp.attend.operators import as_inputs, cut, fake_gradients, over_batch
from scrimp.attend.precision import compute_dtype, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "scrimp::clustered_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor assignment, Tensor? key_lengths, int clusters, int topk,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    clusters: int,
    topk: int,
    scale: float,
) -> Outputs:
    """The output and `Saved`'s fields. topk 0 is plain clustered attention; topk is at most the number of keys."""
    native = kernels_for(query)
    with without_autocast(query):
        if native is None or key.shape[2] == 0:
            out, saved = forward_twin(query, key, value, assignment, key_lengths, clusters, topk, scale)
            return out, *saved
        return _forward_native(native, query, key, value, assignment, key_lengths, clusters, topk, scale)


@torch.library.custom_op(
    "scrimp::clustered_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor assignment, Tensor? key_lengths, Tensor lse,"
    " Tensor mass, Tensor bottom, Tensor top, float scale) -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    bottom: Tensor,
    top: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the output's."""
    native, saved = kernels_for(query), Saved(lse, mass, bottom, top)
    with without_autocast(query):
        if native is None or key.shape[2] == 0:
            return backward_twin(grad, query, key, value, assignment, key_lengths, saved, scale)
        return _backward_native(native, grad, query, key, value, assignment, key_lengths, saved, scale)


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def as_int64(key_lengths: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64) if key_lengths is None else key_lengths.to(torch.int64).contiguous()


def _forward_native(
    native: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    clusters: int,
    topk: int,
    scale: float,
) -> Outputs:
    batch, heads, queries, _ = query.shape
    inputs = (*map(packed, (query, key, value)), assignment.contiguous())
    dim, value_dim = inputs[0].shape[3], inputs[2].shape[3]
    out = torch.empty(batch, heads, queries, value_dim)
    lse, mass = torch.empty(batch, heads, clusters), torch.empty(batch, heads, clusters)
    bottom = torch.empty(batch, heads, clusters, value_dim)
    top = torch.empty(batch, heads, clusters, topk, dtype=torch.int64)
    sizes = [batch, heads, key.shape[1], queries, key.shape[2], dim, value_dim, clusters, topk]
    lengths = as_int64(key_lengths)
    native.clustered_forward(sizes, scale, lengths.data_ptr(), addresses(*inputs, out, lse, mass, bottom, top))
    real = value.shape[3]
    return cut(out, real).to(query.dtype), lse, mass, cut(bottom, real), top


def _backward_native(
    native: ModuleType,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    saved: Saved,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    keys, clusters, topk = key.shape[2], saved.lse.shape[2], saved.top.shape[3]
    inputs = (*map(packed, (query, key, value)), assignment.contiguous())
    dim, value_dim = inputs[0].shape[3], inputs[2].shape[3]
    kept = (saved.lse.contiguous(), saved.mass.contiguous(), packed(saved.bottom), saved.top.contiguous(), packed(grad))
    grads = tuple(torch.empty(batch, heads, *shape) for shape in ((queries, dim), (keys, dim), (keys, value_dim)))
    sizes = [batch, heads, key.shape[1], queries, keys, dim, value_dim, clusters, topk]
    lengths = as_int64(key_lengths)
    native.clustered_backward(sizes, scale, lengths.data_ptr(), addresses(*inputs, *kept, *grads))
    return as_inputs(grads, (query, key, value))


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    clusters: int,
    topk: int,
    scale: float,
) -> Outputs:
    batch, heads, queries, _ = query.shape
    width, dtype = value.shape[3], compute_dtype(query.dtype)
    lse, mass = (query.new_empty(batch, heads, clusters, dtype=dtype) for _ in range(2))
    bottom = query.new_empty(batch, heads, clusters, width, dtype=dtype)
    top = query.new_empty(batch, heads, clusters, topk, dtype=torch.int64)
    return query.new_empty(batch, heads, queries, width), lse, mass, bottom, top


@attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(query, key, value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, key, value, assignment, key_lengths, _, _, scale = inputs
    ctx.save_for_backward(query, key, value, assignment, key_lengths, *output[1:])
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*attend_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None, None)


attend.register_autograd(_gradients, setup_context=_keep)


for _op in (group, attend, attend_backward):
    _op.register_vmap(over_batch(_op))


@register_flop_formula(torch.ops.scrimp.clustered_attention)
def _forward_flops(
    query_shape: Any, key_shape: Any, value_shape: Any, a: Any, b: Any, clusters: int, topk: int, *args: Any, **_: Any
) -> int:
    batch, heads, queries, dim = query_shape
    return 2 * batch * heads * (clusters * key_shape[2] + queries * topk) * (dim + value_shape[3])


@register_flop_formula(torch.ops.scrimp.clustered_attention_backward)
def _backward_flops(
    grad: Any,
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
    a: Any,
    b: Any,
    lse: Any,
    mass: Any,
    bottom: Any,
    top_shape: Any,
    *args: Any,
    **_: Any,
) -> int:
    batch, heads, queries, dim = query_shape
    _, _, clusters, topk = top_shape
    # logits again, dP and four gradients: three products with the keys, two with the values
    return 2 * batch * heads * (clusters * key_shape[2] + queries * topk) * (3 * dim + 2 * value_shape[3])
