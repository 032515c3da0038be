"""Causal (improved) clustered attention and its gradient in torch: any device and type; the kernels' reference.

Notation: a block's queries i see the own block's keys s, and the past through the nearest cluster c of their epoch:
P_cs the centroid's weights on all earlier keys, T_c its best keys, m_c their mass, b_c what the other keys give.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.attend.checks import length_mask, repeat_heads
from scrimp.attend.clustered_twin import top_keys
from scrimp.attend.grouping_ops import count_by_cluster, sum_by_cluster
from scrimp.attend.precision import compute_dtype

_INFINITY = float("inf")


class Plan(NamedTuple):
    """Numbers of a call."""

    clusters: int
    topk: int
    block: int
    scale: float


class Saved(NamedTuple):
    """What the backward needs beside the inputs and the output. Blocks: all but the first."""

    lse: Tensor  # [batch, heads, tokens], log of all the mass a token sees; inf where it sees no key
    nearest: Tensor  # [batch, heads, tokens], int64, a token's cluster; 0 in the first block
    past_lse: Tensor  # [batch, heads, blocks, clusters], log of the centroids' normaliser; inf where there is no key
    bottom: Tensor  # [batch, heads, blocks, clusters, value dim], b
    top: Tensor  # [batch, heads, blocks, clusters, topk], int32, T, then -1 where there are fewer keys


def epoch_starts(tokens: int, block: int) -> list[int]:
    """Tokens before each epoch, which are those it groups: block, 2 block, 4 block, ..."""
    return [block << epoch for epoch in range(tokens.bit_length()) if block << epoch < tokens]


class Problem:
    """The inputs in the type computed in, heads repeated, queries scaled."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, plan: Plan) -> None:
        dtype, heads, tokens = compute_dtype(query.dtype), query.shape[1], query.shape[2]
        self.query = query.to(dtype) * plan.scale
        self.key, self.value = (repeat_heads(tensor.to(dtype), heads) for tensor in (key, value))
        self.real = None if key_lengths is None else length_mask(key_lengths, tokens)[:, None, None, :]
        self.plan, self.tokens = plan, tokens

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.tokens, self.plan.block):
            yield slice(start, min(start + self.plan.block, self.tokens))

    def near_logits(self, here: slice) -> Tensor:
        """[.., block, block], -inf for later keys and where there is none."""
        logits = self.query[:, :, here] @ self.key[:, :, here].mT
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return self.known(logits.masked_fill(ahead, -_INFINITY), here)

    def known(self, logits: Tensor, here: slice) -> Tensor:
        return logits if self.real is None else logits.masked_fill(~self.real[..., here], -_INFINITY)


class EpochGroups:
    """An epoch's clusters of the queries before it."""

    def __init__(self, problem: Problem, assignment: Tensor, start: int) -> None:
        first = start - problem.plan.block
        self.places = assignment[:, :, first : first + start]
        scaled, clusters = problem.query[:, :, :start], problem.plan.clusters
        counts = count_by_cluster(self.places, self.places >= 0, clusters)
        self.empty, self.counts = counts == 0, counts.clamp_min(1)[..., None]
        self.centroids = sum_by_cluster(scaled, self.places, clusters) / self.counts

    def nearest(self, query: Tensor) -> Tensor:
        centroids = self.centroids.detach()
        half = centroids.square().sum(-1).div(2).masked_fill(self.empty, _INFINITY)
        return (query.detach() @ centroids.mT - half[:, :, None]).argmax(-1)


def forward_twin(
    query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, key_lengths: Tensor | None, plan: Plan
) -> tuple[Tensor, Saved]:
    """Output [batch, heads, tokens, value dim] and what the backward needs. Autograd differentiates it, too."""
    problem = Problem(query, key, value, key_lengths, plan)
    starts = set(epoch_starts(problem.tokens, plan.block))
    outs, lses, looks = [], [], []
    for here in problem.slices():
        near_weights, lse = _softmax(problem.near_logits(here))
        out = near_weights @ problem.value[:, :, here]
        if here.start in starts:
            past = _Past(problem, EpochGroups(problem, assignment, here.start))
            past.see(slice(0, here.start))
        if here.start:
            looks.append(look := past.attend(here))
            masses, _ = _softmax(torch.stack((lse, look.lse), -1))
            out = masses[..., :1] * out + masses[..., 1:] * look.out
            lse = torch.logaddexp(lse, look.lse)
            past.see(here)
        outs.append(out)
        lses.append(lse.detach())
    return torch.cat(outs, 2).to(query.dtype), _saved(problem, lses, looks)


class _Look(NamedTuple):
    """A block's view of the past: out [.., block, value dim], already divided, the log of its mass, and `Saved`'s."""

    out: Tensor
    lse: Tensor
    nearest: Tensor
    past_lse: Tensor
    bottom: Tensor
    top: Tensor


def _saved(problem: Problem, lses: list[Tensor], looks: list[_Look]) -> Saved:
    shape, plan, like = problem.query.shape[:2], problem.plan, problem.query
    first = torch.zeros(*shape, lses[0].shape[2], dtype=torch.int64, device=like.device)
    nearest = torch.cat([first, *(look.nearest for look in looks)], 2)
    if not looks:
        sizes = (*shape, 0, plan.clusters)
        top = like.new_empty(*sizes, plan.topk, dtype=torch.int32)
        return Saved(
            _closed(torch.cat(lses, 2)),
            nearest,
            like.new_empty(sizes),
            like.new_empty(*sizes, problem.value.shape[3]),
            top,
        )
    past_lse, bottom = (torch.stack([look[place] for look in looks], 2).detach() for place in (3, 4))
    top = torch.stack([look.top for look in looks], 2).int()
    return Saved(_closed(torch.cat(lses, 2)), nearest, _closed(past_lse), bottom, top)


def _closed(lse: Tensor) -> Tensor:
    """inf for -inf: every later exp(logit - lse) is then 0."""
    return lse.masked_fill(lse == -_INFINITY, _INFINITY)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse of the last dimension; zeros and -inf where every logit is -inf, without NaN in the gradient."""
    empty = (logits == -_INFINITY).all(-1, keepdim=True)
    safe = logits.masked_fill(empty, 0.0)
    lse = safe.logsumexp(-1, keepdim=True)
    return (safe - lse).exp().masked_fill(empty, 0.0), lse.masked_fill(empty, -_INFINITY)[..., 0]


class _Past:
    """Earlier keys as centroids see them: running softmax statistics and each centroid's best keys."""

    def __init__(self, problem: Problem, groups: EpochGroups) -> None:
        counts = groups.centroids.shape[:3]
        self.problem, self.groups = problem, groups
        self.out = groups.centroids.new_zeros(*counts, problem.value.shape[3])
        self.lse = groups.centroids.new_full(counts, -_INFINITY)
        self.top, self.top_logits = groups.places.new_zeros(*counts, 0), groups.centroids.new_zeros(*counts, 0)

    def see(self, here: slice) -> None:
        """Takes in the next keys."""
        logits = self.problem.known(self.groups.centroids @ self.problem.key[:, :, here].mT, here)
        weights, lse = _softmax(logits)
        masses, both = _softmax(torch.stack((self.lse, lse), -1))
        self.out = masses[..., :1] * self.out + masses[..., 1:] * (weights @ self.problem.value[:, :, here])
        self.lse = both
        self._rank(logits.detach(), here)

    def _rank(self, logits: Tensor, here: slice) -> None:
        """The best keys so far are the best of the former ones and the new: places in their concatenation, in order."""
        places = torch.arange(here.start, here.stop, device=logits.device)
        places = torch.cat((self.top, places.expand(logits.shape)), -1)
        logits = torch.cat((self.top_logits, logits), -1)
        chosen = top_keys(logits, min(self.problem.plan.topk, logits.shape[-1]))
        absent = chosen < 0
        self.top = places.gather(-1, chosen.clamp_min(0)).masked_fill(absent, -1)
        self.top_logits = logits.gather(-1, chosen.clamp_min(0)).masked_fill(absent, -_INFINITY)

    def attend(self, here: slice) -> _Look:
        """The past as the queries ``here`` see it."""
        query = self.problem.query[:, :, here]
        nearest = self.groups.nearest(query)
        if self.problem.plan.topk == 0:
            return _Look(pick(self.out, nearest), pick(self.lse, nearest), nearest, self.lse, self.out, self.top)
        keys, values = (rows_at(rows, self.top) for rows in (self.problem.key, self.problem.value))
        absent = self.top < 0
        mass_of = (keys @ self.groups.centroids[..., None])[..., 0] - _finite(self.lse)[..., None]
        shares = mass_of.masked_fill(absent, -_INFINITY).exp()
        bottom = self.out - (shares[..., None, :] @ values)[..., 0, :]
        mass = pick(shares.sum(-1), nearest)
        logits = (pick(keys, nearest) @ query[..., None])[..., 0]
        weights, lse = _softmax(logits.masked_fill(pick(absent, nearest), -_INFINITY))
        exact = (weights[..., None, :] @ pick(values, nearest))[..., 0, :]
        out = mass[..., None] * exact + pick(bottom, nearest)
        missing = self.problem.plan.topk - self.top.shape[-1]
        top = torch.nn.functional.pad(self.top, (0, missing), value=-1)
        return _Look(out, lse - mass.masked_fill(mass == 0, 1.0).log(), nearest, self.lse, bottom, top)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -_INFINITY, 0.0)


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """rows [batch, heads, count, ...] at places [batch, heads, n]; whole rows are copied, which gather does not do."""
    pairs, count, rest = rows.shape[0] * rows.shape[1], rows.shape[2], rows.shape[3:]
    first = count * torch.arange(pairs, device=places.device).view(*rows.shape[:2], 1)
    picked = rows.reshape(pairs * count, prod(rest)).index_select(0, (places + first).flatten())
    return picked.view(*places.shape, *rest)


def rows_at(rows: Tensor, top: Tensor) -> Tensor:
    """rows [.., keys, n] at top [.., clusters, topk]; any row where top is -1."""
    return pick(rows, top.clamp_min(0).flatten(2)).unflatten(2, top.shape[2:])
