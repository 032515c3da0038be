"""A map of embeddings in two dimensions: principal components, then exact t-SNE.

Sources: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 9 (2008); the start from principal components
is Kobak and Berens' (Nature Communications 10, 2019), the step sizes are Belkina et al.'s (the same volume).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError

PERPLEXITY = 30.0
"""How many neighbours of a point count, smoothly; a third of the others where there are few points."""
FEWEST = 5
"""Points from which on neighbours are embedded; fewer are placed by their components alone."""
_COMPONENTS = 30
_ITERATIONS, _EARLY, _EXAGGERATION = 350, 100, 12.0
_START = 1e-4  # spread of the first map: so small that every point still feels every other
_PRECISIONS = (1e-3, 1e6)  # of a point's Gaussian, as multiples of one over its mean squared distance
_HALVINGS = 32  # of the interval that a point's precision is sought in


def embedding_map(features: Tensor, *, iterations: int = _ITERATIONS) -> Tensor:
    """Lay out embeddings in the plane so that near neighbours stay near.

    Rows are brought to unit length (so that nearness is cosine), reduced to 30 principal components, and moved by
    exact t-SNE from the first two components on. Nothing is left to chance: the same rows give the same map on the same
    machine. Fewer than 5 points are placed by their components alone.

    Time and memory grow with n squared: 1,500 points take a few seconds and 50 MB on a processor.

    Args:
        features: [n, dim], n from 1.
        iterations: steps of gradient descent.

    Returns:
        [n, 2] on the device of ``features``, float32 or wider, centred on 0, longest along the first axis.
        Otherwise axes and scale have no meaning.

    Raises:
        InputError: another shape, no rows, or features that are not finite.
    """
    _check(features)
    with torch.no_grad():
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        points = principal_components(functional.normalize(wide, dim=1), _COMPONENTS)
        first = points[:, :2] if points.shape[1] > 1 else functional.pad(points, (0, 1))
        if len(points) < FEWEST:
            return first.contiguous()
        affinity = affinities(points, min(PERPLEXITY, (len(points) - 1) / 3))
        return _turned(_descend(affinity, _scaled(first), iterations))


def principal_components(rows: Tensor, count: int) -> Tensor:
    """Rows [n, dim] in their first principal components, [n, min(count, n, dim)], each pointing where it is longest.

    By way of the n x n inner products, so that the cost does not grow with the width of the features.
    """
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    count = min(count, *rows.shape)
    scores = (vectors * values.clamp(min=0).sqrt()).flip(1)[:, :count]
    longest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    return torch.where(longest < 0, -scores, scores)


def affinities(points: Tensor, perplexity: float) -> Tensor:
    """The joint probabilities p_ij of t-SNE (equation 1 and section 3.1): [n, n], symmetric, summing to 1.

    Each point's Gaussian is as wide as gives its neighbours' distribution an entropy of log(perplexity), found by
    halving an interval of log precisions. A point with more equally near neighbours than that spreads over them all.

    Args:
        points: [n, d].
        perplexity: below n - 1.
    """
    # By differences, not by |a|^2 + |b|^2 - 2ab: near duplicates would lose their distance to rounding.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    # Counted from the nearest neighbour, which changes no probability and keeps every row's exponentials above 0.
    distance = distance.fill_diagonal_(torch.inf).sub_(distance.amin(1, keepdim=True)).fill_diagonal_(0)
    typical = distance.mean(1, keepdim=True).clamp(min=1e-12)
    low, high = (torch.full_like(typical, math.log(bound)) for bound in _PRECISIONS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        wide = _entropy(distance, middle.exp() / typical) > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    weight = torch.exp(-distance * (low.exp() / typical)).fill_diagonal_(0)
    conditional = weight / weight.sum(1, keepdim=True)
    return (conditional + conditional.T) / (2 * len(points))


def gradient(affinity: Tensor, place: Tensor, *, space: Tensor | None = None) -> Tensor:
    """Of the divergence KL(P || Q) by the map's points (equation 5 of the paper), [n, 2].

    Args:
        affinity: P, [n, n].
        place: the map, [n, 2].
        space: two tables to work in, [2, n, n], overwritten; without them half of the time goes into fresh memory.
    """
    kernel, pull = affinity.new_empty(2, *affinity.shape) if space is None else space
    square, one = place.square().sum(1, keepdim=True), torch.ones_like(place[:, :1])
    # 1 + |a|^2 + |b|^2 - 2ab as one product, which passes over the table once.
    torch.mm(torch.cat([-2 * place, square + 1, one], 1), torch.cat([place, one, square], 1).T, out=kernel)
    kernel.clamp_(min=1).reciprocal_().fill_diagonal_(0)
    torch.sub(affinity, kernel, alpha=1 / kernel.sum().item(), out=pull).mul_(kernel)
    pulled = pull @ torch.cat([place, one], 1)
    return 4 * (pulled[:, 2:] * place - pulled[:, :2])


def kept_neighbours(features: Tensor, place: Tensor, *, k: int = 10) -> float:
    """Share of the ``k`` (at most n - 1) nearest by cosine of every point that are among its k nearest on the map.

    Args:
        features: [n, dim], n from 2.
        place: the map, [n, 2].
    """
    k = min(k, len(features) - 1)
    rows = functional.normalize(features.to(place.dtype), dim=1)
    near = _others(rows @ rows.T, k)
    drawn = _others(-torch.cdist(place, place), k)
    return (near[:, :, None] == drawn[:, None, :]).any(2).double().mean().item()


def _check(features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise InputError("features [n, dim] of one image or more", f"{list(features.shape)}", "embed some images first")
    if not bool(torch.isfinite(features).all()):
        raise InputError(
            "finite features", "an infinite or NaN one", "check that the encoder's training did not diverge"
        )


def _entropy(distance: Tensor, precision: Tensor) -> Tensor:
    """Of each row's distribution over the others, [n, 1], in nats."""
    weight = torch.exp(-distance * precision).fill_diagonal_(0)
    total = weight.sum(1, keepdim=True)
    return total.log() + precision * (weight * distance).sum(1, keepdim=True) / total


def _scaled(place: Tensor) -> Tensor:
    spread = place[:, 0].std()
    return place * (_START / spread) if bool(spread > 0) else torch.zeros_like(place)


def _descend(affinity: Tensor, place: Tensor, iterations: int) -> Tensor:
    """Gradient descent with momentum, no gains; the first steps, on exaggerated affinities, form the clusters."""
    velocity, space = torch.zeros_like(place), affinity.new_empty(2, *affinity.shape)
    early = affinity * _EXAGGERATION
    for step in range(iterations):
        drawn, exaggeration, momentum = (early, _EXAGGERATION, 0.5) if step < _EARLY else (affinity, 1.0, 0.8)
        rate = len(place) / (4 * exaggeration)
        velocity = momentum * velocity - rate * gradient(drawn, place, space=space)
        place = place + velocity
    return place


def _turned(place: Tensor) -> Tensor:
    """The map with its longer way across, which is how pages are shaped."""
    turn = torch.linalg.eigh(place.T @ place).eigenvectors.flip(1)
    return place @ torch.where(turn.sum(0) < 0, -turn, turn)


def _others(similar: Tensor, k: int) -> Tensor:
    """The k best of each row but the point itself."""
    return similar.fill_diagonal_(-torch.inf).topk(k, dim=1).indices
