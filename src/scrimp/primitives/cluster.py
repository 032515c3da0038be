"""k-means for features: few centres of many numbers, k-means++ start, matrix products in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import CHUNK, Gaps, Points, nearest_of, plus_plus


@dataclass(frozen=True)
class Clusters:
    """A partition of rows.

    Attributes:
        centres: [k, d], float32 or wider.
        labels: [m], int64: the nearest centre of each row, of equals the first.
        squared: [m]: squared distance to it.
    """

    centres: Tensor
    labels: Tensor
    squared: Tensor


def kmeans(
    values: Tensor,
    k: int,
    *,
    among: Tensor | None = None,
    weights: Tensor | None = None,
    iterations: int = 20,
    batch: int | None = None,
    generator: torch.Generator,
) -> Clusters:
    """Centres of least squared distance (Lloyd 1982), from a k-means++ start.

    A centre left without rows moves to one of those served worst. Stops early once no row changes its centre.

    Args:
        values: [n, d], floating and finite.
        k: centres, 1 to the number of rows.
        among: indices [m] of the rows to cluster; all where omitted.
        weights: [m], > 0; all alike where omitted.
        iterations: movements of the centres, at most.
        batch: rows drawn once to move the centres by, per centre; every row is assigned at the end. By default 256,
            and from 140 centres on fewer, down to 40 from 354 on, for the sake of time.
        generator: CPU generator.

    Returns:
        Clusters of the m rows, on the device of ``values``.

    Raises:
        InputError: another shape, or more centres than rows, or a setting below 1.
    """
    rows = torch.arange(len(values), device=values.device) if among is None else among
    if values.ndim != 2 or not 1 <= k <= len(rows):
        raise InputError("values [n, d] and 1 to n centres", f"{list(values.shape)}, {k} centres", "ask for fewer")
    batch = max(40, min(256, 5_000_000 // k**2)) if batch is None else batch
    if iterations < 1 or batch < 1:
        raise InputError("iterations and batch of at least 1", f"{iterations}, {batch}", "raise them")
    heavy = torch.ones(len(rows), device=values.device) if weights is None else weights
    wide = torch.promote_types(values.dtype, torch.float32)
    drawn = torch.arange(len(rows), device=values.device)
    if batch * k < len(rows):
        drawn = torch.randperm(len(rows), generator=generator)[: batch * k].to(values.device)
    lesson, mass = values[rows[drawn]].to(wide), heavy[drawn]
    middle = lesson.mean(0)
    centres, *told = _moved(lesson.sub_(middle), mass.to(wide), k, iterations, generator)
    labels = torch.full((len(rows),), -1, device=values.device)
    squared = lesson.new_zeros(len(rows))
    labels[drawn], squared[drawn] = told
    for part in (labels < 0).nonzero().flatten().split(CHUNK):
        labels[part], squared[part] = assign(values[rows[part]].to(wide) - middle, centres)
    return Clusters(centres + middle, labels, squared)


def assign(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, of equals the first, and its squared distance.

    Args:
        values: [n, d].
        centres: [k, d], of the same dtype, k >= 1.

    Returns:
        Labels [n] int64 and squared distances [n].
    """
    lengths = centres.square().sum(1)
    pieces = []
    for piece in values.split(CHUNK):
        squared, labels = nearest_of(piece.square().sum(1), lengths, piece @ centres.T)
        pieces.append((labels, squared))
    if not pieces:
        return torch.zeros(0, dtype=torch.int64, device=values.device), values.new_zeros(0)
    return torch.cat([item[0] for item in pieces]), torch.cat([item[1] for item in pieces])


def _moved(
    rows: Tensor, mass: Tensor, k: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres after so many rounds of assignment and averaging; each row's centre then, and its squared distance."""
    gaps = Gaps(Points(rows, centred=True))
    start = plus_plus(gaps, k, mass=mass, generator=generator)
    gaps.settle()
    centres, labels, squared = rows[torch.tensor(start, device=rows.device)], gaps.places, gaps.bounds
    before = None
    for _ in range(iterations):
        changed = torch.ones(k, dtype=torch.bool, device=rows.device)
        if before is not None:
            other = labels != before
            if not bool(other.any()):
                break
            changed.zero_()
            changed[labels[other]] = changed[before[other]] = True
        moved = _means(rows, mass, labels, centres)
        empty = (torch.bincount(labels, minlength=k) == 0).nonzero().flatten()
        moved[empty] = rows[(squared * mass).topk(len(empty)).indices]
        changed[empty] = True
        # A centre whose rows are the same stays, to the bit, and so do the distances to it.
        centres = torch.where(changed[:, None], moved, centres)
        before, (labels, squared) = labels, _assigned_anew(rows, centres, changed, labels, squared)
    return centres, labels, squared


def _assigned_anew(
    rows: Tensor, centres: Tensor, changed: Tensor, labels: Tensor, squared: Tensor
) -> tuple[Tensor, Tensor]:
    """`assign` where only some centres have changed: rows of the others are compared with those that have alone."""
    which = changed.nonzero().flatten()
    stale = changed[labels]
    if len(which) + int(stale.sum()) / len(rows) * len(centres) > 1.2 * len(centres):  # copying rows costs too
        return assign(rows, centres)
    labels, squared = labels.clone(), squared.clone()
    for part in stale.nonzero().flatten().split(CHUNK):
        labels[part], squared[part] = assign(rows[part], centres)
    for part in (~stale).nonzero().flatten().split(CHUNK):
        found, distance = assign(rows[part], centres[which])
        found, old = which[found], squared[part]
        nearer = (distance < old) | ((distance == old) & (found < labels[part]))
        labels[part] = torch.where(nearer, found, labels[part])
        squared[part] = torch.where(nearer, distance, old)
    return labels, squared


def _means(rows: Tensor, mass: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    sums, total = torch.zeros_like(centres), mass.new_zeros(len(centres))
    for start in range(0, len(rows), CHUNK):
        here = slice(start, start + CHUNK)
        sums.index_add_(0, labels[here], rows[here] * mass[here, None])
    total.index_add_(0, labels, mass)
    return torch.where(total[:, None] > 0, sums / total[:, None].clamp_min(torch.finfo(sums.dtype).tiny), centres)
