"""Labels for what all others are most like: greedy maximisation of a smooth coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import Points
from scrimp.select.active_density import all_distances
from scrimp.select.active_pool import Pool, chosen, pool
from scrimp.select.selection import Selection

_ROWS = 256  # candidates whose gains are added up at a time
_LOOK = 64  # candidates looked at again together


def herding(
    features: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    bandwidth: float = 100.0,
    sample: int = 4096,
    generator: torch.Generator,
) -> Selection:
    """MaxHerding: each next image the one that most raises how well the labelled ones cover all others.

    The coverage is ``sum_x max_c k(x, c)`` over all images x, c being labelled or chosen (Bae, Noh and Sutherland,
    "Generalized Coverage for More Robust Low-Budget Active Learning", ECCV 2024, algorithm 1), with the kernel
    ``k(x, c) = exp(-|x - c|^2 / (bandwidth * s))``, s the mean squared distance between two images. The paper's is of
    a width fixed beforehand, about 1 here where features are of unit length; a wide one makes this the greedy choice
    of k medoids by squared distance. Exact up to ``sample`` unlabelled images; beyond, so many of them, drawn at
    random, are the candidates and what is to be covered. When all is covered, as by copies, the rest is random.

    Args:
        features: [n, d]; unit length is usual.
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        bandwidth: of the kernel, in mean squared distances.
        sample: images looked at; the memory is ``4 sample^2`` bytes for float32.
        generator: CPU generator.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices, in order of choice.

    Raises:
        InputError: features not finite, indices out of range, a budget below 0, a bandwidth not above 0 or no sample.
    """
    if not 0 < bandwidth < float("inf") or sample < 1:
        raise InputError("a bandwidth above 0 and a sample of at least 1", f"{bandwidth}, {sample}", "correct them")
    known = pool(features, labelled, budget)
    spread = 2 * Points(known.features).squares().mean() if known.budget else torch.zeros(())
    if not float(spread) > 0:  # nothing wanted, or all images alike
        return chosen(known, [], generator=generator)
    rows = known.left
    if len(rows) > sample:
        rows = rows[torch.randperm(len(rows), generator=generator)[:sample].sort().values.to(rows.device)]
    gaps = _gaps_(all_distances(known.features[rows], known.features[rows]), bandwidth * spread)
    picks = greedy_coverage(gaps, _uncovered(known, rows, bandwidth * spread), known.budget)
    return chosen(known, rows[picks], generator=generator)


def _gaps_(squared: Tensor, width: Tensor) -> Tensor:
    """``1 - k``, which keeps its digits where k is close to 1."""
    return squared.div_(-width).expm1_().neg_()


def _uncovered(known: Pool, rows: Tensor, width: Tensor) -> Tensor:
    """The gap of each of those rows to what is labelled, 1 where nothing is."""
    values = known.features[rows]
    found = torch.ones(len(rows), dtype=width.dtype, device=rows.device)
    for part in known.labelled.split(_ROWS) if len(known.labelled) else ():
        nearest = all_distances(values, known.features[part]).amin(1)
        found = torch.minimum(found, _gaps_(nearest, width))
    return found


def greedy_coverage(gaps: Tensor, uncovered: Tensor, budget: int) -> Tensor:
    """Rows chosen one by one to lower ``sum_x min_c gaps[c, x]`` the most; of equals the first; until nothing is
    gained beyond rounding.

    A gain never grows as others are chosen, so that an old one bounds it (Minoux 1978) and few are added up again.

    Args:
        gaps: [m, m], symmetric, from 0 to 1, 0 for each row itself: how badly it covers the others.
        uncovered: [m], the least gap of each before.
        budget: how many, at most.

    Returns:
        Indices [at most budget], in order.
    """
    bounds = torch.cat([_gains(part, uncovered) for part in gaps.split(_ROWS)])
    noise = 4 * float(torch.finfo(gaps.dtype).eps * gaps.mean() * len(gaps))
    picks: list[int] = []
    while len(picks) < min(budget, len(gaps)):
        index = _most_gained_(bounds, gaps, uncovered)
        if not float(bounds[index]) > noise:
            break
        picks.append(index)
        uncovered = torch.minimum(uncovered, gaps[index])
        bounds[index] = 0
    return torch.tensor(picks, dtype=torch.int64, device=gaps.device)


def _most_gained_(bounds: Tensor, gaps: Tensor, uncovered: Tensor) -> int:
    """The first row of largest gain; sets the bounds of all it looks at to their gains."""
    fresh = torch.zeros_like(bounds, dtype=torch.bool)
    while True:
        best = float(torch.where(fresh, bounds, -1.0).max())
        stale = torch.where(fresh, -1.0, bounds)
        tried = stale.topk(min(_LOOK, len(bounds))).indices
        tried = tried[stale[tried] >= max(best, 0.0)]
        if len(tried) == 0:
            return int((bounds == best).nonzero()[0])
        bounds[tried] = _gains(gaps[tried], uncovered)
        fresh[tried] = True


def _gains(gaps: Tensor, uncovered: Tensor) -> Tensor:
    return (uncovered - gaps).clamp_min_(0).sum(1)
