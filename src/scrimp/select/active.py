"""Which images to label: ``(features, probabilities, labelled, budget) -> Selection``; the baseline and combinations.

Strategies: `random_labels` (baseline) here; by clusters, distances and density in `active_centres`, `active_density`
and `active_herding`; by the model's doubt in `active_doubt`; by gradients in `active_gradients`; of scikit-activeml in
`active_bridge`.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.select.active_pool import Strategy, chosen, pool, predictions
from scrimp.select.selection import Selection


def random_labels(
    features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
) -> Selection:
    """The baseline: unlabelled images at random, without replacement.

    Args:
        features: [n, d].
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        generator: CPU generator.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices.

    Raises:
        InputError: features not finite, indices out of range, or a budget below 0.
    """
    return chosen(pool(features, labelled, budget), [], generator=generator)


def cold_start(first: Strategy, later: Strategy, *, until: int = 0) -> Strategy:
    """A strategy that needs no model at first: ``first`` without probabilities or below ``until`` labels, then
    ``later``.

    With few labels a model's doubt says little, and choosing by it does worse than random; choosing by clusters does
    better (Pourahmadi, Nooralinejad, Pirsiavash 2021, arXiv 2110.12033; Hacohen et al. 2022, arXiv 2202.02794).

    Args:
        first: such as `nearest_to_centres` or `typicality`.
        later: such as `badge` or `margin`.
        until: labels needed before ``later`` is asked; a few a class are usual.
    """

    def strategy(
        features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
    ) -> Selection:
        early = probabilities is None or len(labelled.unique()) < until
        return (first if early else later)(features, probabilities, labelled, budget, generator=generator)

    return strategy


def balanced(inner: Strategy) -> Strategy:
    """The same strategy with labels spread evenly over the predicted classes, against imbalance.

    Each label goes to the class that has fewest so far, labelled images counted by the class they are predicted as;
    ``inner`` then chooses within each class. Where a rare class is never predicted it is not found this way.

    Args:
        inner: any strategy; it sees the images of one predicted class at a time.

    Returns:
        A strategy that needs probabilities.
    """

    def strategy(
        features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
    ) -> Selection:
        known = pool(features, labelled, budget)
        values = predictions(probabilities, len(features))
        classes = values.argmax(1)
        count = values.shape[1]
        have = torch.bincount(classes[known.labelled], minlength=count)
        room = torch.bincount(classes[known.left], minlength=count)
        mask, found = known.unlabelled(), []
        for index, share in enumerate(even_shares(have.tolist(), room.tolist(), known.budget)):
            if share == 0:
                continue
            rows = (classes == index).nonzero().flatten()
            inside = (~mask[rows]).nonzero().flatten()
            part = inner(features[rows], values[rows], inside, share, generator=generator)
            found.append(rows[part.indices])
        return chosen(known, torch.cat(found) if found else [], generator=generator)

    return strategy


def even_shares(have: list[int], room: list[int], budget: int) -> list[int]:
    """How many more each class gets, so that the smallest totals are raised first; of equals the first class.

    Args:
        have: what each class has.
        room: how many more each can take.
        budget: how many to share out, at most the sum of ``room``.

    Raises:
        InputError: lists of different lengths.
    """
    if len(have) != len(room):
        raise InputError("as many counts as rooms", f"{len(have)} and {len(room)}", "pass one of each a class")
    shares = [0] * len(have)
    queue = [(had, index) for index, had in enumerate(have) if room[index]]
    heapq.heapify(queue)
    for _ in range(min(budget, sum(room))):
        had, index = heapq.heappop(queue)
        shares[index] += 1
        if shares[index] < room[index]:
            heapq.heappush(queue, (had + 1, index))
    return shares
