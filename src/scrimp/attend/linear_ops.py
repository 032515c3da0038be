"""The operators ``scrimp::linear_attention``, its backward, and ``scrimp::linear_attention_step_``.

One operator for every device and type. The dispatcher sees it whole: compilation, autocast, vmap and FLOP counting need
no path of their own. The backward is derived by hand and cannot itself be differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from scrimp.attend import linear_kernel as kernel
from scrimp.attend.linear_twin import CHUNK
from scrimp.attend.operators import over_batch

_LIBRARY = torch.library.Library("scrimp", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? kv, Tensor? normaliser"
_OPTIONS = "bool causal, int query_map, int key_map, float eps"


def _register(name: str, arguments: str, returns: int, implementation: Any, fake: Any) -> Any:
    """Define an operator for every device."""
    results = ", ".join(["Tensor"] * returns)
    _LIBRARY.define(f"{name}({arguments}) -> ({results})" if returns > 1 else f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scrimp::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.scrimp, name).default


attention_op = _register("linear_attention", f"{_INPUTS}, {_OPTIONS}", 4, kernel.forward, kernel.forward_fake)
backward_op = _register(
    "linear_attention_backward",
    f"Tensor grad_out, Tensor? grad_kv, Tensor? grad_normaliser, {_INPUTS}, Tensor out, Tensor denominators, "
    f"{_OPTIONS}",
    5,
    kernel.backward,
    kernel.backward_fake,
)
step_op = _register(
    "linear_attention_step_",
    "Tensor query, Tensor key, Tensor value, Tensor(a!) kv, Tensor(b!) normaliser, "
    "int query_map, int key_map, float eps",
    1,
    kernel.step,
    kernel.step_fake,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, causal, query_map, key_map, eps = inputs
    out, denominators, kv_after, normaliser_after = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(denominators)
    # What the queries met: the state before the first token in causal order, that of all keys without an order.
    met = tensors[4:6] if causal else [kv_after, normaliser_after]
    ctx.save_for_backward(*tensors[:4], *met, out, denominators)
    ctx.options = (causal, query_map, key_map, eps)
    ctx.has_state = tensors[4] is not None


def _differentiate(
    ctx: Any, grad_out: Tensor | None, _: None, grad_kv: Tensor | None, grad_normaliser: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_out = torch.zeros_like(saved[6]) if grad_out is None else grad_out
    plain = _plain(grad_out, *saved[:3])
    with torch.no_grad():
        run = kernel.backward if plain else backward_op
        grads = run(grad_out, *_both(grad_kv, grad_normaliser, saved), *saved, *ctx.options)
    if plain and torch.is_grad_enabled():
        grads = _Once.apply(len(grads), *grads, grad_out, *saved[:3])  # type: ignore[no-untyped-call]
    before = grads[3:] if ctx.has_state else (None, None)
    return *grads[:3], None, *before, None, None, None, None


class _Once(torch.autograd.Function):
    """The first ``count`` tensors, their gradient refused. Without it a gradient penalty would see constants."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the gradient of linear attention is derived by hand and has no gradient of its own; "
            "use a feature map and torch products where second derivatives are needed"
        )


def _both(grad_kv: Tensor | None, grad_normaliser: Tensor | None, saved: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of S and Z: both or neither, zeros for the one that is missing."""
    if grad_kv is None and grad_normaliser is None:
        return None, None
    query, key, value = saved[:3]
    kv, normaliser = kernel.empty_states(query, key, value)
    return (
        kv.zero_() if grad_kv is None else grad_kv,
        normaliser.zero_() if grad_normaliser is None else grad_normaliser,
    )


torch.library.register_autograd("scrimp::linear_attention", _differentiate, setup_context=_remember, lib=_LIBRARY)


class _Transformed(torch.autograd.Function):
    """The operator for torch.func, whose transforms refuse the autograd formulas of registered operators."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return attention_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _differentiate(ctx, *grads)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return over_batch(_Transformed.apply)(info, dims, *inputs)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, which at a small model's sizes takes longer than the kernel."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel.forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _differentiate(ctx, *grads)


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing has to see the operator: ordinary tensors, no transform, no dispatch mode, no compiler."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and all(type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor) for tensor in tensors)
    )


def attend(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator, differentiable by autograd, by torch.func and under torch.compile.

    query, key, value, key_lengths, S and Z before (or ``None``), causal, codes of the two maps, eps -> output,
    denominators, S and Z after.
    """
    if torch.compiler.is_compiling():
        return attention_op(*inputs)
    if _plain(*inputs[:3]):
        return _Direct.apply(*inputs)  # type: ignore[no-untyped-call]
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs)  # type: ignore[no-untyped-call]
    return attention_op(*inputs)


def step(*inputs: Any) -> Tensor:
    """One token: query, key, value, S and Z (changed), codes of the two maps, eps -> output. Records no gradient."""
    if _plain(*inputs[:3]):
        return kernel.step(*inputs)
    return step_op(*inputs)


torch.library.register_vmap("scrimp::linear_attention", over_batch(attention_op), lib=_LIBRARY)
torch.library.register_vmap("scrimp::linear_attention_backward", over_batch(backward_op), lib=_LIBRARY)


def _work(query: Any, key: Any, value: Any) -> tuple[int, int, int, int, int]:
    """Multiply-adds of a product of all queries, or all keys, with a state; and of their triangles of scores."""
    batch, heads, queries, dim = query
    key_heads, keys, value_dim = key[1], key[2], value[3]
    state = dim * value_dim
    # In a chunk of c tokens, row i of the triangle has i + 1 numbers.
    triangle = batch * heads * queries * (min(CHUNK, queries) + 1) // 2
    return batch * heads * queries * state, batch * key_heads * keys * state, triangle, dim, value_dim


@register_flop_formula(torch.ops.scrimp.linear_attention)
def _forward_flops(*inputs: Any, **_: Any) -> int:
    by_queries, by_keys, triangle, dim, value_dim = _work(*inputs[:3])
    causal = inputs[6]
    return 2 * (by_queries + by_keys + causal * triangle * (dim + value_dim))


@register_flop_formula(torch.ops.scrimp.linear_attention_backward)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    # Causal order sums S once more, and needs both triangles (one of them twice) and three products with them.
    by_queries, by_keys, triangle, dim, value_dim = _work(*inputs[3:6])
    causal = inputs[11]
    return 2 * (2 * by_queries + (2 + causal) * by_keys + causal * triangle * 3 * (dim + value_dim))


@register_flop_formula(torch.ops.scrimp.linear_attention_step_)
def _step_flops(*inputs: Any, **_: Any) -> int:
    by_queries, by_keys, *_triangle = _work(*inputs[:3])
    return 2 * (by_queries + by_keys)
