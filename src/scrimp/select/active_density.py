"""Labels for what many others are like: choices where images lie densely."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from scrimp.primitives.cluster import kmeans
from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import nearest
from scrimp.primitives.seeding import squared_distances
from scrimp.select.active_pool import Pool, chosen, pool
from scrimp.select.selection import Selection

_ROWS = 256  # rows of a table of distances handled at a time
_SMALL = 5  # clusters up to this size come last, as in the paper


def typicality(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    neighbours: int = 20,
    clusters: int = 500,
    sample: int = 1024,
    generator: torch.Generator,
) -> Selection:
    """TypiClust: of each cluster without labels, the largest first, the image in the densest place.

    ``typicality(x) = 1 / mean distance to its nearest neighbours`` within the cluster (Hacohen, Dekel and Weinshall,
    "Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets", ICML 2022, eq. 1 and algorithm 1).
    Differences: every choice goes to the cluster with fewest labels, then the largest; a cluster of more than
    ``sample`` images is represented by so many of them, drawn at random.

    Args:
        features: [n, d]; unit length is usual.
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        neighbours: nearest ones the density is taken over; at most half the cluster's.
        clusters: at most; else as many as there are to be labels in all.
        sample: unlabelled images of a cluster that are compared.
        generator: CPU generator.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices, in order of choice.

    Raises:
        InputError: features not finite, indices out of range, a budget below 0 or a setting below 1.
    """
    if min(neighbours, clusters, sample) < 1:
        got = f"{neighbours}, {clusters}, {sample}"
        raise InputError("neighbours, clusters and sample of at least 1", got, "raise them")
    known = pool(features, labelled, budget)
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    k = min(len(known.labelled) + known.budget, clusters)
    labels = kmeans(known.features, k, iterations=10, generator=generator).labels
    turns = _turns(labels, known, k)
    ranked: dict[int, list[int]] = {}
    for cluster in sorted(set(turns)):
        members = known.left[labels[known.left] == cluster]
        if len(members) > sample:
            drawn = torch.randperm(len(members), generator=generator)[:sample].sort().values
            members = members[drawn.to(members.device)]
        order = mean_distance(known.features[members], neighbours).argsort(stable=True)
        ranked[cluster] = members[order].tolist()[::-1]
    found = [ranked[cluster].pop() for cluster in turns if ranked[cluster]]
    return chosen(known, found, generator=generator)


def _turns(labels: Tensor, known: Pool, k: int) -> list[int]:
    """The cluster each choice is made from."""
    sizes = torch.bincount(labels, minlength=k).tolist()
    have = torch.bincount(labels[known.labelled], minlength=k).tolist()
    room = torch.bincount(labels[known.left], minlength=k).tolist()
    queue = [(size <= _SMALL, had, -size, i) for i, (size, had) in enumerate(zip(sizes, have, strict=True)) if room[i]]
    heapq.heapify(queue)
    turns: list[int] = []
    while len(turns) < known.budget:
        small, had, size, index = heapq.heappop(queue)
        turns.append(index)
        room[index] -= 1
        if room[index]:
            heapq.heappush(queue, (small, had + 1, size, index))
    return turns


def mean_distance(values: Tensor, neighbours: int) -> Tensor:
    """Mean distance of each row to its nearest others, [m]: the reciprocal of its typicality; 0 for a row alone.

    Args:
        values: [m, d].
        neighbours: how many; at most half of m (rounded down, but one if there is another row).
    """
    rows = values.to(torch.promote_types(values.dtype, torch.float32))
    rows = rows - rows.mean(0)
    k = min(neighbours, max(1, len(rows) // 2), len(rows) - 1)
    if k < 1:
        return rows.new_zeros(len(rows))
    squares = rows.square().sum(1)
    # <(x, -1/2), (y, |y|^2)> = <x, y> - |y|^2 / 2 is largest where y is nearest to x.
    keys = torch.cat([rows, squares[:, None]], 1)
    queries = torch.cat([rows, torch.full_like(squares, -0.5)[:, None]], 1)
    similar, found = nearest(queries, keys, k + 1)
    sums = squares[:, None] + squares[found]
    gaps = squares[:, None] - 2 * similar
    gaps = torch.where(gaps <= 8 * torch.finfo(gaps.dtype).eps * sums, 0.0, gaps)
    return gaps.sqrt().sum(1) / k  # each row is its own nearest, at distance 0


def coverage(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    classes: int | None = None,
    purity: float = 0.95,
    sample: int = 5120,
    generator: torch.Generator,
) -> Selection:
    """ProbCover: each next image the one whose ball holds most images that no labelled one's ball holds yet.

    Yehuda et al., "Active Learning Through a Covering Lens", NeurIPS 2022 (arXiv 2205.11320), algorithm 1, with the
    radius of their section 3.2 (`pure_radius`). Exact up to ``sample`` images; beyond, candidates are so many images
    drawn at random, and what a ball holds is counted among them. When all is covered, the rest is drawn at random.

    Args:
        features: [n, d]; unit length is usual.
        probabilities: only their number of classes is looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        classes: clusters whose purity the radius is measured by; by default as many as ``probabilities`` has, and
            without those as many as there are to be labels in all.
        purity: share of the balls that must lie within one cluster.
        sample: images looked at; the memory is ``5 sample^2`` bytes for float32.

    Returns, raises: as `typicality`; also InputError for a purity outside (0, 1].
    """
    if not 0 < purity <= 1 or sample < 1 or (classes is not None and classes < 1):
        got = f"{purity}, {sample}, {classes}"
        raise InputError("a purity in (0, 1], sample and classes of at least 1", got, "correct them")
    known = pool(features, labelled, budget)
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    if classes is None:
        classes = len(known.labelled) + known.budget if probabilities is None else probabilities.shape[1]
    rows = _sampled(len(known.features), sample, generator).to(known.left.device)
    values = known.features[rows]
    labels = kmeans(values, min(max(2, classes), len(rows)), iterations=10, generator=generator).labels
    squared = all_distances(values, values)
    reach = pure_radius(squared, labels, purity)
    covered = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for part in known.labelled.split(512):
        covered |= (all_distances(values, known.features[part]) <= reach).any(1)
    holds = squared <= reach
    del squared  # the larger of the two
    picks = greedy_cover(holds, covered, known.unlabelled()[rows], known.budget)
    return chosen(known, rows[picks], generator=generator)


def _sampled(count: int, sample: int, generator: torch.Generator) -> Tensor:
    if count <= sample:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:sample].sort().values


def all_distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances [n, m] of rows, in pieces beyond the result."""
    wide = torch.promote_types(left.dtype, torch.float32)
    middle = right.to(wide).mean(0)
    others = right.to(wide) - middle
    squares = others.square().sum(1)
    found = torch.empty(len(left), len(right), dtype=wide, device=left.device)
    for start in range(0, len(left), _ROWS):
        piece = left[start : start + _ROWS].to(wide) - middle
        found[start : start + _ROWS] = squared_distances(piece.square().sum(1), squares, piece @ others.T)
    return found


def pure_radius(squared: Tensor, labels: Tensor, purity: float) -> Tensor:
    """The square of the widest radius at which a share ``purity`` of the balls holds one label only.

    A ball is pure up to the distance r of the nearest point with another label, so that the radius is just below the
    ``1 - purity`` quantile of r; infinite where there is one label.

    Args:
        squared: squared distances [m, m].
        labels: [m].
        purity: in (0, 1].
    """
    nearest_other = squared.new_full((len(squared),), torch.inf)
    for start in range(0, len(squared), _ROWS):
        here = slice(start, start + _ROWS)
        same = labels[here, None] == labels
        nearest_other[here] = squared[here].masked_fill(same, torch.inf).amin(1)
    impure = min(int((1 - purity) * len(squared) + 1e-9), len(squared) - 1)  # so many balls may hold another label
    edge = nearest_other.sort().values[impure]
    return torch.nextafter(edge, torch.zeros_like(edge)) if bool(edge < torch.inf) else edge


def greedy_cover(holds: Tensor, covered: Tensor, allowed: Tensor, budget: int) -> Tensor:
    """Rows chosen one by one to cover most columns not covered yet; of equals the first; until nothing is gained.

    Args:
        holds: bool [m, m]; what each row covers; symmetric.
        covered: bool [m], columns covered before.
        allowed: bool [m], rows that may be chosen.
        budget: how many, at most.

    Returns:
        Indices [at most budget], in order.
    """
    covered, allowed = covered.clone(), allowed.clone()
    gains = torch.zeros(len(holds), dtype=torch.int64, device=holds.device)
    for part in (~covered).nonzero().flatten().split(_ROWS):
        gains += holds[part].sum(0)
    picks: list[int] = []
    while len(picks) < budget:
        open_gains = torch.where(allowed, gains, 0)
        best = int(open_gains.max())
        if best == 0:
            break
        index = int((open_gains == best).nonzero()[0])
        picks.append(index)
        allowed[index] = False
        fresh = (holds[index] & ~covered).nonzero().flatten()
        covered[fresh] = True
        for part in fresh.split(_ROWS):
            gains -= holds[part].sum(0)
    return torch.tensor(picks, dtype=torch.int64, device=holds.device)
