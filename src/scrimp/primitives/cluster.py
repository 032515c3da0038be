"""k-means for features: few centres of many numbers, k-means++ start, matrix products in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import CHUNK, Gaps, Points, plus_plus, squared_distances


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
    taught, mass = rows, heavy
    if batch * k < len(rows):
        drawn = torch.randperm(len(rows), generator=generator)[: batch * k].to(values.device)
        taught, mass = rows[drawn], heavy[drawn]
    lesson = values[taught].to(wide)
    middle = lesson.mean(0)
    centres = _moved(lesson.sub_(middle), mass.to(wide), k, iterations, generator)
    pieces = [assign(values[part].to(wide) - middle, centres) for part in rows.split(CHUNK)]
    labels, squared = (torch.cat(parts) for parts in zip(*pieces, strict=True))
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
        distances = squared_distances(piece.square().sum(1), lengths, piece @ centres.T)
        squared, labels = distances.min(1)
        pieces.append((labels, squared))
    if not pieces:
        return torch.zeros(0, dtype=torch.int64, device=values.device), values.new_zeros(0)
    return torch.cat([item[0] for item in pieces]), torch.cat([item[1] for item in pieces])


def _moved(rows: Tensor, mass: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres after so many rounds of assignment and averaging."""
    start = plus_plus(Gaps(Points(rows)), k, mass=mass, generator=generator)
    centres = rows[torch.tensor(start, device=rows.device)]
    before = None
    for _ in range(iterations):
        labels, squared = assign(rows, centres)
        if before is not None and torch.equal(labels, before):
            break
        centres = _means(rows, mass, labels, centres)
        empty = (torch.bincount(labels, minlength=k) == 0).nonzero().flatten()
        worst = (squared * mass).topk(len(empty)).indices
        centres[empty] = rows[worst]
        before = labels
    return centres


def _means(rows: Tensor, mass: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    sums, total = torch.zeros_like(centres), mass.new_zeros(len(centres))
    for start in range(0, len(rows), CHUNK):
        here = slice(start, start + CHUNK)
        sums.index_add_(0, labels[here], rows[here] * mass[here, None])
    total.index_add_(0, labels, mass)
    return torch.where(total[:, None] > 0, sums / total[:, None].clamp_min(torch.finfo(sums.dtype).tiny), centres)
