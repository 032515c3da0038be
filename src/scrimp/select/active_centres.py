"""Labels for what stands in the middle, or farthest out: choices by clusters and distances of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.cluster import Clusters, kmeans
from scrimp.primitives.seeding import Gaps, Points, farthest
from scrimp.select.active_pool import chosen, pool
from scrimp.select.selection import Selection


def nearest_to_centres(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    iterations: int = 10,
    generator: torch.Generator,
) -> Selection:
    """K-means with as many clusters as there are to be labels in all; of each new cluster the image nearest its centre.

    With nothing labelled this is the low-budget baseline of Pourahmadi, Nooralinejad and Pirsiavash, "A Simple Baseline
    for Low-Budget Active Learning" (2021, arXiv 2110.12033). Afterwards, clusters that hold a labelled image are passed
    over, and the largest of the others served: labels given cannot be given back, as its single-round variant would.

    Args:
        features: [n, d]; unit length is usual.
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        iterations: of k-means, at most.
        generator: CPU generator.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices, of the largest cluster first.

    Raises:
        InputError: features not finite, indices out of range, or a budget below 0.
    """
    known = pool(features, labelled, budget)
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    count = len(known.labelled) + known.budget
    found = kmeans(known.features, count, iterations=iterations, generator=generator)
    sizes = torch.bincount(found.labels, minlength=count)
    sizes[found.labels[known.labelled]] = 0
    order = sizes.argsort(descending=True, stable=True)
    served = order[sizes[order] > 0][: known.budget]
    return chosen(known, representatives(found, len(known.features))[served], generator=generator)


def multi_round(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    iterations: int = 10,
    generator: torch.Generator,
) -> Selection:
    """K-means of the unlabelled images only, with ``budget`` clusters each round: the multi-round variant there.

    Costs the same however many labels there are, but may choose near an image that has one.

    Args, returns, raises: as `nearest_to_centres`.
    """
    known = pool(features, labelled, budget)
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    found = kmeans(known.features, known.budget, among=known.left, iterations=iterations, generator=generator)
    sizes = torch.bincount(found.labels, minlength=known.budget)
    order = sizes.argsort(descending=True, stable=True)
    rows = representatives(found, len(known.left))[order[sizes[order] > 0]]
    return chosen(known, known.left[rows], generator=generator)


def representatives(clusters: Clusters, count: int) -> Tensor:
    """The member nearest each centre, [k]; of equals the first; ``count`` where a cluster is empty."""
    k = len(clusters.centres)
    best = clusters.squared.new_full((k,), torch.inf).scatter_reduce(0, clusters.labels, clusters.squared, "amin")
    nearest = (clusters.squared == best[clusters.labels]).nonzero().flatten()
    return torch.full_like(best, count, dtype=torch.int64).scatter_reduce(0, clusters.labels[nearest], nearest, "amin")


def k_centre(
    features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
) -> Selection:
    """Each next image the one farthest from all labelled and chosen ones: greedy core-set.

    At most twice the best radius that covers everything (Gonzalez 1985); as a choice of labels from Sener and Savarese,
    "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018. Finds outliers, and so loses to
    random while labels are few. With nothing labelled, the first is drawn at random.

    Args, returns, raises: as `nearest_to_centres`; in order of choice.
    """
    known = pool(features, labelled, budget)
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    gaps = Gaps(Points(known.features))
    allowed = known.unlabelled()
    first: list[int] = []
    if len(known.labelled):
        gaps.include(known.labelled)
    else:
        first = [int(torch.randint(len(known.features), (1,), generator=generator))]
        gaps.add(first[0])
        allowed[first[0]] = False
    return chosen(known, first + farthest(gaps, known.budget - len(first), allowed=allowed), generator=generator)
