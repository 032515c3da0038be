"""(Improved) clustered attention and its gradient in torch: any device and type, and the compiled kernels' reference.

Notation of the paper (arXiv 2007.04825, sections 3.2 and 3.3): cluster j, members i, keys s; P_js the centroid's
weights, T_j its top keys, m_j their mass. Nothing of size queries x keys is made, nor clusters x keys kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.attend.checks import length_mask, repeat_heads
from scrimp.attend.grouping_ops import count_by_cluster, sum_by_cluster
from scrimp.attend.operators import as_inputs
from scrimp.attend.precision import compute_dtype

_QUERIES = 512  # at a time: their copies of the top keys take queries x topk x dim numbers


class Saved(NamedTuple):
    """What the backward needs beside the inputs."""

    lse: Tensor  # [batch, heads, clusters], log of the centroids' normaliser; inf where there is no key
    mass: Tensor  # [batch, heads, clusters], m_j
    bottom: Tensor  # [batch, heads, clusters, value dim], sum over s outside T of P_js V_s
    top: Tensor  # [batch, heads, clusters, topk], int64, T_j rising, then -1 where there are fewer keys


class _Problem:
    """The inputs in the type computed in, heads repeated, with the centroids' logits on demand."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, clusters: int, scale: float
    ) -> None:
        dtype, heads = compute_dtype(query.dtype), query.shape[1]
        self.query = query.to(dtype)
        self.key, self.value = (repeat_heads(tensor.to(dtype), heads) for tensor in (key, value))
        self.real = assignment >= 0
        self.places, self.clusters, self.scale = assignment.clamp_min(0), clusters, scale
        self.counts = count_by_cluster(self.places, self.real, clusters).clamp_min(1)[..., None]
        self.centroids = self.per_cluster(self.query) / self.counts

    def per_cluster(self, rows: Tensor) -> Tensor:
        """Sums over members: [.., queries, n] -> [.., clusters, n]."""
        return sum_by_cluster(rows.masked_fill(~self.real[..., None], 0.0), self.places, self.clusters)

    def per_query(self, rows: Tensor, part: slice = slice(None)) -> Tensor:
        """Each member its cluster's: [.., clusters, ...] -> [.., queries, ...]."""
        places = self.places[:, :, part]
        shape = places.shape + rows.shape[3:]
        return rows.gather(2, places.reshape(places.shape + (1,) * (rows.dim() - 3)).expand(shape))

    def logits(self, key_lengths: Tensor | None) -> Tensor:
        """[.., clusters, keys], -inf where there is no key."""
        logits = self.scale * (self.centroids @ self.key.mT)
        if key_lengths is None:
            return logits
        return logits.masked_fill(~length_mask(key_lengths, logits.shape[-1])[:, None, None, :], float("-inf"))

    def chunks(self) -> list[slice]:
        return [slice(start, start + _QUERIES) for start in range(0, self.query.shape[2], _QUERIES)]


def rows_at(rows: Tensor, top: Tensor) -> Tensor:
    """rows [.., keys, n] at top [.., clusters, topk] as [.., clusters, topk, n]; any row where top is -1."""
    flat = top.clamp_min(0).flatten(2)[..., None].expand(*top.shape[:2], -1, rows.shape[-1])
    return rows.gather(2, flat).unflatten(2, top.shape[2:])


def top_keys(logits: Tensor, topk: int) -> Tensor:
    """Places of the ``topk`` largest, rising; on ties the earlier key; -1 at the end for logits of -inf."""
    keys = logits.shape[-1]
    if topk == 0:
        return logits.new_empty(*logits.shape[:-1], 0, dtype=torch.int64)
    bar = logits.topk(topk).values[..., -1:]
    above, level = logits > bar, logits == bar
    chosen = above | (level & (level.cumsum(-1) <= topk - above.sum(-1, keepdim=True)))
    chosen &= logits > float("-inf")
    # Distinct whole numbers, the larger the earlier the key: topk sorts the chosen ones by their place.
    order = torch.where(chosen, keys - torch.arange(keys, device=logits.device), 0).topk(topk).values
    return torch.where(order > 0, keys - order, -1)


def exact_weights(problem: _Problem, keys: Tensor, top: Tensor, part: slice) -> Tensor:
    """softmax(scale q_i K_T^T), [.., part, topk]; keys [.., clusters, topk, dim]. Zeros where there is no key."""
    logits = problem.scale * (problem.per_query(keys, part) @ problem.query[:, :, part, :, None])[..., 0]
    absent = problem.per_query(top, part) < 0
    logits = logits.masked_fill(absent, float("-inf")).masked_fill(absent.all(-1, keepdim=True), 0.0)
    return logits.softmax(-1).masked_fill(absent, 0.0)


def forward_twin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    clusters: int,
    topk: int,
    scale: float,
) -> tuple[Tensor, Saved]:
    """Output [batch, heads, queries, value dim] and what the backward needs."""
    problem = _Problem(query, key, value, assignment, clusters, scale)
    logits = problem.logits(key_lengths)
    lse = logits.logsumexp(-1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    top = top_keys(logits, topk)
    weights = (logits - lse[..., None]).exp()
    best = weights.gather(3, top.clamp_min(0)).masked_fill(top < 0, 0.0)
    mass = best.sum(-1)
    bottom = clear(weights, top) @ problem.value
    out = problem.per_query(bottom)
    if topk:
        keys, values = rows_at(problem.key, top), rows_at(problem.value, top)
        exact = [
            (exact_weights(problem, keys, top, part)[..., None, :] @ problem.per_query(values, part))[..., 0, :]
            for part in problem.chunks()
        ]
        out = out + problem.per_query(mass[..., None]) * torch.cat(exact, 2)
    return out.masked_fill(~problem.real[..., None], 0.0).to(query.dtype), Saved(lse, mass, bottom, top)


def clear(weights: Tensor, top: Tensor) -> Tensor:
    """weights [.., clusters, keys] with 0 at the top keys."""
    keep = torch.ones_like(weights).scatter_reduce(3, top.clamp_min(0), (top < 0).to(weights.dtype), "amin")
    return weights * keep


def backward_twin(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    key_lengths: Tensor | None,
    saved: Saved,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value with the assignment and the top keys held constant."""
    problem = _Problem(query, key, value, assignment, saved.lse.shape[2], scale)
    grad = grad.to(problem.query.dtype).masked_fill(~problem.real[..., None], 0.0)
    gathered = problem.per_cluster(grad)
    query_grad, key_grad, value_grad, mass_grad = _pull_exact(problem, grad, saved)
    weights = (problem.logits(key_lengths) - saved.lse[..., None]).exp()
    # dP: the members' gradient times V outside T, the mass's gradient inside.
    inside = torch.zeros_like(weights).scatter_reduce(
        3, saved.top.clamp_min(0), (saved.top >= 0).to(grad.dtype), "amax"
    )
    pull = torch.where(inside > 0, mass_grad[..., None], gathered @ problem.value.mT)
    pull = weights * (pull - (weights * pull).sum(-1, keepdim=True))
    value_grad += (weights * (1 - inside)).mT @ gathered
    key_grad += scale * (pull.mT @ problem.centroids)
    shared = scale * (pull @ problem.key) / problem.counts
    query_grad = (query_grad + problem.per_query(shared)).masked_fill(~problem.real[..., None], 0.0)
    return as_inputs((query_grad, key_grad, value_grad), (query, key, value))


def _pull_exact(problem: _Problem, grad: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through m_j softmax(scale q_i K_T^T) V_T: the gradients of query, key, value (all heads) and of the mass."""
    top, scale = saved.top, problem.scale
    query_grad, mass_grad = torch.zeros_like(problem.query), torch.zeros_like(saved.mass)
    if top.shape[-1] == 0:
        return query_grad, torch.zeros_like(problem.key), torch.zeros_like(problem.value), mass_grad
    keys, values = rows_at(problem.key, top), rows_at(problem.value, top)
    keys_grad, values_grad = torch.zeros_like(keys), torch.zeros_like(values)
    for part in problem.chunks():
        weights, out = exact_weights(problem, keys, top, part), grad[:, :, part]
        pull = (problem.per_query(values, part) @ out[..., None])[..., 0]
        mean = (weights * pull).sum(-1, keepdim=True)
        weights_mass = weights * problem.per_query(saved.mass[..., None], part)
        pull = scale * weights_mass * (pull - mean)
        query_grad[:, :, part] = (pull[..., None, :] @ problem.per_query(keys, part))[..., 0, :]
        places = problem.places[:, :, part]
        mass_grad.scatter_add_(2, places, mean[..., 0])
        _add_outer(keys_grad, places, pull, problem.query[:, :, part])
        _add_outer(values_grad, places, weights_mass, out)
    key_grad, value_grad = torch.zeros_like(problem.key), torch.zeros_like(problem.value)
    for total, part_grad in ((key_grad, keys_grad), (value_grad, values_grad)):
        flat = top.clamp_min(0).flatten(2)[..., None].expand(*top.shape[:2], -1, total.shape[-1])
        total.scatter_add_(2, flat, part_grad.flatten(2, 3))
    return query_grad, key_grad, value_grad, mass_grad


def _add_outer(total: Tensor, places: Tensor, left: Tensor, right: Tensor) -> None:
    """total[.., places_i, t, :] += left[.., i, t] right[.., i, :], in place."""
    outer = left[..., None] * right[..., None, :]
    total.scatter_add_(2, places[..., None, None].expand_as(outer), outer)
