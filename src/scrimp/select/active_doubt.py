"""Labels for what the model is least sure of: margin and entropy, with a choice of spreading them out."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.cluster import kmeans
from scrimp.primitives.errors import InputError
from scrimp.select.active_centres import representatives
from scrimp.select.active_pool import Pool, chosen, pool, predictions
from scrimp.select.attention_maps import entropy
from scrimp.select.selection import Selection


def margin(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    diverse: int = 1,
    generator: torch.Generator,
) -> Selection:
    """The images whose two most probable classes are closest: smallest ``p_(1) - p_(2)`` (Scheffer et al. 2001).

    Args:
        features: [n, d]; looked at where ``diverse`` is above 1.
        probabilities: [n, classes].
        labelled: indices of the images that have a label.
        budget: how many more to label.
        diverse: so many times the budget of the most doubtful images are clustered by features into ``budget``
            clusters, each weighed by its doubt, and of each cluster that nearest its centre is taken (Zhdanov, "Diverse
            mini-batch Active Learning", 2019, arXiv 1901.05954); 10 is usual there. 1 takes the most doubtful.
        generator: CPU generator; it also breaks ties.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices; without ``diverse`` the most doubtful first.

    Raises:
        InputError: no probabilities, features not finite, indices out of range, a budget below 0, ``diverse`` below 1.
    """
    known = pool(features, labelled, budget)
    values = predictions(probabilities, len(features))[known.left]
    best = values.topk(min(2, values.shape[1]), dim=1).values
    doubt = 1 - best[:, 0] + (best[:, 1] if best.shape[1] > 1 else 0)
    return _most_doubtful(known, doubt, diverse, generator)


def predictive_entropy(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    diverse: int = 1,
    generator: torch.Generator,
) -> Selection:
    """The images of largest entropy ``-sum_c p_c log p_c`` of the model's prediction.

    Args, returns, raises: as `margin`.
    """
    known = pool(features, labelled, budget)
    values = predictions(probabilities, len(features))[known.left]
    return _most_doubtful(known, entropy(values), diverse, generator)


def _most_doubtful(known: Pool, doubt: Tensor, diverse: int, generator: torch.Generator) -> Selection:
    """``doubt`` [unlabelled], >= 0."""
    if diverse < 1:
        raise InputError("diverse of at least 1", f"{diverse}", "use 1 for the most doubtful alone")
    # Saturated predictions tie in large numbers, and files are often sorted by class: the first would be one class.
    shuffled = torch.randperm(len(doubt), generator=generator).to(doubt.device)
    order = shuffled[doubt[shuffled].argsort(descending=True, stable=True)]
    short = order[: diverse * known.budget]
    if diverse == 1 or len(short) <= known.budget or known.budget == 0:
        return chosen(known, known.left[order[: known.budget]], generator=generator)
    rows = known.left[short]
    weights = doubt[short].clamp_min(1e-6)
    found = kmeans(known.features, known.budget, among=rows, weights=weights, iterations=10, generator=generator)
    spread = representatives(found, len(rows))
    spread = spread[spread < len(rows)]
    left_over = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    left_over[spread] = False
    return chosen(known, torch.cat([rows[spread], rows[left_over]]), generator=generator)
