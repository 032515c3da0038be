"""The gradient of causal (improved) clustered attention in torch, with assignments and best keys held constant.

With G = dOut and d_i = G_i.out_i, and p = exp(logit - lse_i), which is the whole weight of a key of the own block or of
T: there dlogit = p (G_i.v - d_i), here p (G_i.v - x_i / m), x_i = d_i - G_i.b. A member's share of the past is
w_i = sum_T p / m, and the centroid, with g = sum_i w_i G_i, gets dP = g.v_s outside T, sum_i w_i x_i / m inside.
Between the blocks of an epoch P differs by its normaliser only, so that every key meets the centroids once an epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.attend.causal_clustered_twin import EpochGroups, Plan, Problem, Saved, epoch_starts, pick, rows_at
from scrimp.attend.grouping_ops import sum_by_cluster
from scrimp.attend.operators import as_inputs


def backward_twin(
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
    """Gradients of query, key, value from the output and its gradient."""
    problem = Problem(query, key, value, key_lengths, plan)
    pull = _Pull(problem, grad.to(problem.query.dtype), out, saved)
    starts = epoch_starts(problem.tokens, plan.block)
    for start in starts:
        blocks = [here for here in problem.slices() if start <= here.start < 2 * start]
        pull.epoch(EpochGroups(problem, assignment, start), blocks)
    for here in problem.slices():
        pull.near(here)
    return as_inputs((pull.query * plan.scale, pull.key, pull.value), (query, key, value))


class _Pull:
    """Gradients so far, of the scaled queries and of the keys and values of every head."""

    def __init__(self, problem: Problem, grad: Tensor, out: Tensor, saved: Saved) -> None:
        self.problem, self.grad, self.saved = problem, grad, saved
        self.delta = (grad * out).sum(-1)
        self.query, self.key, self.value = (torch.zeros_like(x) for x in (problem.query, problem.key, problem.value))

    def near(self, here: slice) -> None:
        """Through the own block's weights."""
        problem, grad = self.problem, self.grad[:, :, here]
        weights = (problem.near_logits(here) - self.saved.lse[:, :, here, None]).exp()
        pull = weights * (grad @ problem.value[:, :, here].mT - self.delta[:, :, here, None])
        self.query[:, :, here] += pull @ problem.key[:, :, here]
        self.key[:, :, here] += pull.mT @ problem.query[:, :, here]
        self.value[:, :, here] += weights.mT @ grad

    def epoch(self, groups: EpochGroups, blocks: list[slice]) -> None:
        """Through what an epoch's centroids see."""
        centroid_grad = torch.zeros_like(groups.centroids)
        shape = groups.centroids.shape[:3]
        gathered, delta = self.value.new_zeros(*shape, self.value.shape[3]), self.value.new_zeros(shape)
        reference = torch.full_like(delta, float("inf"))
        for here in reversed(blocks):
            lse = self.saved.past_lse[:, :, here.start // self.problem.plan.block - 1]
            used = torch.zeros_like(delta).scatter_(2, self.saved.nearest[:, :, here], 1.0) > 0
            used &= lse < float("inf")
            factor = (lse - reference).exp().masked_fill(~used, 1.0)
            own_gathered, own_delta = self._members(groups, here, lse, centroid_grad)
            gathered, delta = own_gathered + factor[..., None] * gathered, own_delta + factor * delta
            reference = torch.where(used, lse, reference)
            before = slice(0 if here is blocks[0] else here.start - self.problem.plan.block, here.start)
            self._keys(groups, before, gathered, delta, reference, centroid_grad)
        first = groups.places.shape[2]
        self.query[:, :, :first] += pick(centroid_grad / groups.counts, groups.places)

    def _keys(
        self, groups: EpochGroups, here: slice, gathered: Tensor, delta: Tensor, lse: Tensor, centroid_grad: Tensor
    ) -> None:
        problem = self.problem
        keys, values = problem.key[:, :, here], problem.value[:, :, here]
        weights = (problem.known(groups.centroids @ keys.mT, here) - lse[..., None]).exp()
        pull = weights * (gathered @ values.mT - delta[..., None])
        self.key[:, :, here] += pull.mT @ groups.centroids
        self.value[:, :, here] += weights.mT @ gathered
        centroid_grad += pull @ keys

    def _members(self, groups: EpochGroups, here: slice, lse: Tensor, centroid_grad: Tensor) -> tuple[Tensor, Tensor]:
        """A block's queries: g and sum_i w_i d_i of each cluster; what else they give is added to the gradients."""
        number, clusters = here.start // self.problem.plan.block - 1, lse.shape[2]
        nearest, grad, delta = self.saved.nearest[:, :, here], self.grad[:, :, here], self.delta[:, :, here]
        if self.problem.plan.topk == 0:
            share = (pick(lse, nearest) - self.saved.lse[:, :, here]).exp()
            # inf - inf where a token sees nothing at all
            share = share.masked_fill(pick(lse, nearest) == float("inf"), 0.0)
            return sum_by_cluster(share[..., None] * grad, nearest, clusters), _sums(share * delta, nearest, clusters)
        top = self.saved.top[:, :, number].long()
        keys, values = (rows_at(rows, top) for rows in (self.problem.key, self.problem.value))
        shares = (keys @ groups.centroids[..., None])[..., 0] - lse[..., None]
        shares = shares.masked_fill(top < 0, float("-inf")).exp()
        mass = shares.sum(-1).masked_fill(lse == float("inf"), 1.0)
        share, pulled = self._best(here, top, keys, values, mass)
        gathered = sum_by_cluster(share[..., None] * grad, nearest, clusters)
        inside = _sums(share * pulled, nearest, clusters) / mass
        # The sums over all keys count T as if it were outside: taken off here.
        pull = shares * (inside[..., None] - (values @ gathered[..., None])[..., 0])
        centroid_grad += (pull[..., None, :] @ keys)[..., 0, :]
        self._scatter(self.key, top, pull[..., None] * groups.centroids[..., None, :])
        self._scatter(self.value, top, -shares[..., None] * gathered[..., None, :])
        return gathered, _sums(share * delta, nearest, clusters)

    def _best(self, here: slice, top: Tensor, keys: Tensor, values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Through the queries' own weights on T; w and x."""
        nearest, grad = self.saved.nearest[:, :, here], self.grad[:, :, here]
        own, query = pick(top, nearest), self.problem.query[:, :, here]
        number = here.start // self.problem.plan.block - 1
        logits = (pick(keys, nearest) @ query[..., None])[..., 0].masked_fill(own < 0, float("-inf"))
        weights = (logits - self.saved.lse[:, :, here, None]).exp()
        known = pick(mass, nearest)
        pulled = self.delta[:, :, here] - (grad * pick(self.saved.bottom[:, :, number], nearest)).sum(-1)
        pull = weights * ((pick(values, nearest) @ grad[..., None])[..., 0] - (pulled / known)[..., None])
        self.query[:, :, here] += (pull[..., None, :] @ pick(keys, nearest))[..., 0, :]
        self._scatter(self.key, own, pull[..., None] * query[..., None, :])
        self._scatter(self.value, own, weights[..., None] * grad[..., None, :])
        return weights.sum(-1) / known, pulled

    @staticmethod
    def _scatter(total: Tensor, places: Tensor, rows: Tensor) -> None:
        """Adds rows [.., n, topk, :] at places [.., n, topk]; rows of absent keys are zeros."""
        flat = places.clamp_min(0).flatten(2)[..., None].expand(*places.shape[:2], -1, rows.shape[-1])
        total.scatter_add_(2, flat, rows.flatten(2, 3))


def _sums(numbers: Tensor, places: Tensor, clusters: int) -> Tensor:
    return sum_by_cluster(numbers[..., None], places, clusters)[..., 0]
