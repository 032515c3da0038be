"""Attention at linear cost: formulas in N x N form or query by query as the references, softmax as the baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scrimp.attend import (
    Groups,
    clustered_attention,
    elu_plus_one,
    group_queries,
    improved_clustered_attention,
    linear_attention,
    linear_attention_step,
    softmax_attention,
)
from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.primitives.draw import generator_for

Attention = Callable[..., Tensor]
_EPS = 1e-6
_TOKENS, _CLUSTERS, _TOPK = 77, 7, 9


def check_linear(*, seed: int = 0, attention: Attention = linear_attention) -> list[Finding]:
    """Hold outputs and gradients, full and causal, against the N x N form in float64."""
    found = []
    for causal in (False, True):
        ours = _with_gradients(lambda *x, c=causal: attention(*x, causal=c), _tensors(seed, torch.float32))
        theirs = _with_gradients(lambda *x, c=causal: _quadratic(*x, causal=c), _tensors(seed, torch.float64))
        found += _agree("causal" if causal else "full", ours, theirs)
    return found


def check_recurrent(*, seed: int = 0, step: Callable[..., Any] = linear_attention_step) -> list[Finding]:
    """Hold tokens fed in chunks and one by one against the same attention computed at once."""
    tensors = [x.detach() for x in _tensors(seed, torch.float32)]
    at_once = linear_attention(*tensors, causal=True)
    found = []
    for what, lengths in (
        ("a prefix, then token by token", [51, *[1] * (_TOKENS - 51)]),
        ("token by token", [1] * _TOKENS),
        ("in chunks", [32, 19, _TOKENS - 51]),
    ):
        state, outputs = None, []
        for part in zip(*(x.split(lengths, 2) for x in tensors), strict=True):
            state, out = step(state, *part)
            outputs.append(out)
        found.append(at_most(f"{what}, against the parallel form", _error(torch.cat(outputs, 2), at_once), 1e-5))
    return found


def check_clustered(*, seed: int = 0, attention: Attention = clustered_attention) -> list[Finding]:
    """Hold outputs and gradients against a loop over queries, and one query a cluster against softmax."""
    return [*_check_groups(attention, seed, 0), *_one_query_a_cluster(attention, seed)]


def check_improved(*, seed: int = 0, attention: Attention = improved_clustered_attention) -> list[Finding]:
    """Hold outputs and gradients against a loop over queries, and top-k of all keys against softmax."""

    def all_keys(*tensors: Tensor) -> Tensor:
        return attention(*tensors, groups=_groups(tensors[0]), topk=_TOKENS)

    ours = _with_gradients(all_keys, _tensors(seed, torch.float32))
    theirs = _with_gradients(softmax_attention, _tensors(seed, torch.float64))
    return [
        *_check_groups(attention, seed, _TOPK),
        *_agree("top-k of all keys against softmax", ours, theirs),
    ]


def sides_linear(*, seed: int = 0, device: str = "cpu", tokens: int = 4096) -> Sides:
    return _beside_softmax(linear_attention, seed, device, tokens, causal=True)


def sides_clustered(*, seed: int = 0, device: str = "cpu", tokens: int = 4096) -> Sides:
    return _beside_softmax(clustered_attention, seed, device, tokens)


def sides_improved(*, seed: int = 0, device: str = "cpu", tokens: int = 4096) -> Sides:
    return _beside_softmax(improved_clustered_attention, seed, device, tokens)


def sides_recurrent(*, seed: int = 0, device: str = "cpu", tokens: int = 3072) -> Sides:
    """One more token after a prefix: from the state, or by a softmax over the prefix that was kept."""
    query, key, value = (x.to(device) for x in _inputs(seed, tokens))
    state, _ = linear_attention_step(None, query, key, value)
    last = slice(tokens - 1, tokens)

    def one(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    return Sides(
        one(lambda: linear_attention_step(state, query[:, :, last], key[:, :, last], value[:, :, last])),
        one(lambda: softmax_attention(query[:, :, last], key, value)),
        repeats=200,
    )


def _beside_softmax(attention: Attention, seed: int, device: str, tokens: int, **options: Any) -> Sides:
    tensors = [x.to(device) for x in _inputs(seed, tokens)]
    upstream = torch.ones_like(tensors[0])

    def training(call: Attention) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(call(*leaves, **options), leaves, upstream)

    return Sides(training(attention), training(softmax_attention), repeats=5, threads=2)


def _inputs(seed: int, tokens: int) -> list[Tensor]:
    generator = generator_for(seed, tokens)
    return [torch.randn(1, 8, tokens, 64, generator=generator) for _ in range(3)]


def _tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = generator_for(seed)
    shapes = ((2, 4, _TOKENS, 16), (2, 2, _TOKENS, 16), (2, 2, _TOKENS, 12))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _groups(query: Tensor) -> Groups:
    return group_queries(query.detach().float(), clusters=_CLUSTERS, generator=generator_for(1))


def _check_groups(attention: Attention, seed: int, topk: int) -> list[Finding]:
    options = {"topk": topk} if topk else {}
    groups = _groups(_tensors(seed, torch.float32)[0])
    ours = _with_gradients(lambda *x: attention(*x, groups=groups, **options), _tensors(seed, torch.float32))
    theirs = _with_gradients(
        lambda *x: _by_query(*x, assignment=groups.assignment, topk=topk), _tensors(seed, torch.float64)
    )
    return _agree("groups given", ours, theirs)


def _one_query_a_cluster(attention: Attention, seed: int) -> list[Finding]:
    tensors = _tensors(seed, torch.float32)
    groups = Groups(torch.arange(_TOKENS).repeat(2, 4, 1), torch.ones(2, 4, _TOKENS, dtype=torch.int64))
    ours = _with_gradients(lambda *x: attention(*x, groups=groups), tensors)
    theirs = _with_gradients(softmax_attention, _tensors(seed, torch.float64))
    return _agree("one query a cluster against softmax", ours, theirs)


def _quadratic(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """The formula in N x N form: weights phi(q_i) . phi(k_j), each row over its sum."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = elu_plus_one(query) @ elu_plus_one(key).transpose(-1, -2)
    weights = weights.tril() if causal else weights
    return weights @ value / (weights.sum(-1, keepdim=True) + _EPS)


def _by_query(query: Tensor, key: Tensor, value: Tensor, *, assignment: Tensor, topk: int) -> Tensor:
    """Each query by itself: its cluster's weights, the top ones shared out anew by the query's own logits."""
    repeat = query.shape[1] // key.shape[1]
    rows = []
    for b, h, i in ((b, h, i) for b in range(query.shape[0]) for h in range(query.shape[1]) for i in range(_TOKENS)):
        keys, values = key[b, h // repeat] * query.shape[3] ** -0.5, value[b, h // repeat]
        centre = query[b, h, assignment[b, h] == assignment[b, h, i]].mean(0)
        weights = (keys @ centre).softmax(0)
        if topk:
            top = weights.topk(topk).indices
            own = (keys[top] @ query[b, h, i]).softmax(0) * weights[top].sum()
            weights = weights.index_put((top,), own)
        rows.append(weights @ values)
    return torch.stack(rows).view(*query.shape[:3], -1)


def _with_gradients(call: Attention, tensors: list[Tensor]) -> list[Tensor]:
    out = call(*tensors)
    upstream = torch.randn(out.shape, generator=generator_for(7)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def _agree(what: str, ours: list[Tensor], theirs: list[Tensor]) -> list[Finding]:
    """Relative errors of the output, and of the worst of the three gradients."""
    output, *gradients = (_error(a, b) for a, b in zip(ours, theirs, strict=True))
    return [at_most(f"{what}: output", output, 1e-5), at_most(f"{what}: gradients", max(gradients), 2e-5)]


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
