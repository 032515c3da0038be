"""Causal clustered attention as operators with gradients: compiled kernels on the CPU, torch twins everywhere else."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scrimp.attend.causal_clustered_pull import backward_twin
from scrimp.attend.causal_clustered_twin import Plan, Saved, epoch_starts, forward_twin
from scrimp.attend.clustered_ops import addresses, as_int64
from scrimp.attend.grouping_ops import kernels_for, packed
from scrimp.attend.operators import as_inputs, cut, fake_gradients, over_batch
from scrimp.attend.precision import compute_dtype, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_TILE = 64  # queries the kernel multiplies with their own block at a time


@torch.library.custom_op(
    "scrimp::causal_clustered_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor assignment, Tensor? key_lengths, int clusters, int topk,"
    " int block, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    clusters: int,
    topk: int,
    block: int,
    scale: float,
) -> Outputs:
    """The output and `Saved`'s fields. assignment: [batch, heads, block + 2 block + ..], the epochs' one by one."""
    native, plan = kernels_for(query), Plan(clusters, topk, block, scale)
    with without_autocast(query):
        if native is None:
            out, saved = forward_twin(query, key, value, assignment, key_lengths, plan)
            return out, *saved
        return _forward_native(native, query, key, value, assignment, key_lengths, plan)


@torch.library.custom_op(
    "scrimp::causal_clustered_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor assignment, Tensor? key_lengths, Tensor out,"
    " Tensor lse, Tensor nearest, Tensor past_lse, Tensor bottom, Tensor top, int block, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    nearest: Tensor,
    past_lse: Tensor,
    bottom: Tensor,
    top: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the output's."""
    native, saved = kernels_for(query), Saved(lse, nearest, past_lse, bottom, top)
    plan = Plan(top.shape[3], top.shape[4], block, scale)
    inputs = (query, key, value, assignment, key_lengths, out)
    with without_autocast(query):
        if native is None:
            return backward_twin(grad, *inputs, saved, plan)
        return _backward_native(native, grad, *inputs, saved, plan)


def _sizes(query: Tensor, key: Tensor, inputs: tuple[Tensor, ...], plan: Plan) -> list[int]:
    dims = [inputs[0].shape[3], inputs[2].shape[3]]
    return [query.shape[0], query.shape[1], key.shape[1], query.shape[2], *dims, plan.clusters, plan.topk, plan.block]


def _packed(query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, scale: float) -> tuple[Tensor, ...]:
    return packed(query.float() * scale), packed(key), packed(value), assignment.contiguous()


def _forward_native(
    native: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    plan: Plan,
) -> Outputs:
    tokens, inputs, lengths = query.shape[:3], _packed(query, key, value, assignment, plan.scale), as_int64(key_lengths)
    past = (*tokens[:2], -(-tokens[2] // plan.block) - 1, plan.clusters)
    width = inputs[2].shape[3]
    # Zeros, for clusters no query of a block is near are left out.
    saved = Saved(
        torch.empty(tokens),
        torch.zeros(tokens, dtype=torch.int64),
        torch.zeros(past),
        torch.zeros(*past, width),
        torch.full((*past, plan.topk), -1, dtype=torch.int32),
    )
    out = torch.empty(*tokens, width)
    places = addresses(*inputs, out, *saved)
    native.causal_clustered_forward(_sizes(query, key, inputs, plan), lengths.data_ptr(), places)
    real = value.shape[3]
    lse, nearest, past_lse, bottom, top = saved
    return cut(out, real).to(query.dtype), lse, nearest, past_lse, cut(bottom, real), top


def _backward_native(
    native: ModuleType,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    out: Tensor,
    saved: Saved,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, lengths = _packed(query, key, value, assignment, plan.scale), as_int64(key_lengths)
    lse, nearest, past_lse, bottom, top = (tensor.contiguous() for tensor in saved)
    kept = (packed(out), lse, nearest, past_lse, packed(bottom), top, packed(grad))
    grads = tuple(torch.empty(*query.shape[:3], inputs[place].shape[3]) for place in (0, 1, 2))
    places = addresses(*inputs, *kept, *grads)
    native.causal_clustered_backward(_sizes(query, key, inputs, plan), lengths.data_ptr(), places)
    grads[0].mul_(plan.scale)
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
    block: int,
    scale: float,
) -> Outputs:
    batch, heads, tokens, _ = query.shape
    width, dtype = value.shape[3], compute_dtype(query.dtype)
    past = (batch, heads, (tokens + block - 1) // block - 1, clusters)
    lse, nearest = query.new_empty(query.shape[:3], dtype=dtype), query.new_empty(query.shape[:3], dtype=torch.int64)
    past_lse, bottom = query.new_empty(past, dtype=dtype), query.new_empty(*past, width, dtype=dtype)
    top = query.new_empty(*past, topk, dtype=torch.int32)
    return query.new_empty(batch, heads, tokens, width), lse, nearest, past_lse, bottom, top


@attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(query, key, value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, key, value, assignment, key_lengths, _, _, block, scale = inputs
    ctx.save_for_backward(query, key, value, assignment, key_lengths, *output)
    ctx.block, ctx.scale = block, scale
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*attend_backward(grad, *ctx.saved_tensors, ctx.block, ctx.scale), *(6 * [None]))


attend.register_autograd(_gradients, setup_context=_keep)
for _op in (attend, attend_backward):
    _op.register_vmap(over_batch(_op))


def _pairs(query_shape: Any, clusters: int, topk: int, block: int) -> tuple[int, int]:
    """Pairs of a (head's) query or centroid and a key the kernel multiplies, and of a query and a centroid."""
    tokens, own = query_shape[2], 0
    for first in range(0, tokens, block):
        rows = min(block, tokens - first)
        own += sum(min(_TILE, rows - start) * min(start + _TILE, rows) for start in range(0, rows, _TILE))
    starts = epoch_starts(tokens, block)
    last = [min(2 * start, -(-tokens // block) * block) - block for start in starts]
    looking = max(0, tokens - block)
    return own + clusters * sum(last) + looking * topk, looking * clusters


@register_flop_formula(torch.ops.scrimp.causal_clustered_attention)
def _forward_flops(
    query_shape: Any,
    key: Any,
    value_shape: Any,
    a: Any,
    b: Any,
    clusters: int,
    topk: int,
    block: int,
    *c: Any,
    **_: Any,
) -> int:
    batch, heads, _, dim = query_shape
    keys, centroids = _pairs(query_shape, clusters, topk, block)
    return 2 * batch * heads * (keys * (dim + value_shape[3]) + centroids * dim)


@register_flop_formula(torch.ops.scrimp.causal_clustered_attention_backward)
def _backward_flops(grad: Any, query_shape: Any, key: Any, value_shape: Any, *rest: Any, **_: Any) -> int:
    batch, heads, _, dim = query_shape
    top_shape, block = rest[-3], rest[-2]
    keys = _pairs(query_shape, top_shape[3], top_shape[4], block)[0]
    # logits again, dP and four gradients: three products with the keys, two with the values
    return 2 * batch * heads * keys * (3 * dim + 2 * value_shape[3])
