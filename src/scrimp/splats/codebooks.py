"""Codebooks: a few centres that stand for many rows of numbers, found by k-means (Lloyd 1982)."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

NEIGHBOURS = 64
"""Centres that a row is compared with between the first and the last assignment, unless that is to be exact."""
_CHUNK = 1 << 22  # similarities the torch twin holds at a time
_RENEW = 3  # assignments after which the centres' neighbours are looked for again


def kmeans(
    values: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    seed: int,
    iterations: int = 10,
    batch: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Centres of least squared distance, and the nearest of each row.

    Starts from rows drawn in proportion to their weights. The first and the last assignment are exact; those between
    look at the `NEIGHBOURS` centres nearest to the one a row had, since few rows move further. A centre left without
    rows moves to one of those served worst.

    Args:
        values: [n, d], finite.
        k: centres; more than there are rows is allowed, and leaves rows of zeros without members at the end.
        weights: [n], from 0 up; all alike where omitted.
        seed: of the start and of the batch.
        iterations: movements of the centres.
        batch: rows drawn once to move the centres by; every row where omitted. All rows are assigned at the end.
        exact: compare with every centre each time.

    Returns:
        Centres [k, d] float32 and labels [n] int64, on the device of ``values``.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or settings below 1.
    """
    _check(values, k, weights, iterations, batch)
    rows = values.detach().to(torch.float32)
    middle = rows.mean(0, dtype=torch.float64).to(torch.float32) if len(rows) else rows.new_zeros(rows.shape[1])
    # About the mean, squared lengths are smallest and lose the fewest digits.
    rows = rows - middle
    heavy = torch.ones(len(rows), device=rows.device) if weights is None else weights.detach().to(rows)
    generator = generator_for(seed)
    taught, mass = _drawn_rows(rows, heavy, batch, generator)
    centres = _start(taught, mass, min(k, len(taught)), generator)
    if 0 < len(centres) < len(taught):
        centres = _moved(taught, mass, centres, iterations, exact=exact)
    labels = nearest(rows, centres)[0] if len(centres) else torch.zeros(len(rows), dtype=torch.int64)
    missing = torch.zeros(k - len(centres), rows.shape[1], device=rows.device)
    return torch.cat([centres + middle, missing]), labels.to(rows.device)


def nearest(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, of equals the first, and its squared distance.

    Args:
        values: [n, d] float32.
        centres: [k, d] float32, k >= 1.

    Returns:
        Labels [n] int64 and squared distances [n] float32.
    """
    module = native.load() if values.device.type == "cpu" else None
    if module is None:
        return nearest_torch(values, centres)
    values, centres = values.contiguous(), centres.contiguous()
    labels, distances = torch.zeros(len(values), dtype=torch.int64), torch.zeros(len(values))
    shape = (len(values), values.shape[1], len(centres))
    module.kmeans_nearest(values.data_ptr(), centres.data_ptr(), *shape, labels.data_ptr(), distances.data_ptr())
    return labels, distances


def nearest_torch(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` in torch."""
    half = 0.5 * centres.square().sum(1)
    step = max(1, _CHUNK // len(centres))
    pieces = [torch.argmin(half - piece @ centres.T, 1) for piece in values.split(step)]
    labels = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=values.device)
    return labels, (values - centres[labels]).square().sum(1)


def refine(values: Tensor, centres: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest among the candidates of the centre that each row had.

    Args:
        values, centres: as for `nearest`.
        labels: [n] int64, those the rows had.
        candidates: [k, m] int32, centres to compare a row with, by its label.

    Returns:
        As `nearest`.
    """
    module = native.load() if values.device.type == "cpu" else None
    if module is None:
        return refine_torch(values, centres, labels, candidates)
    values, centres, candidates = values.contiguous(), centres.contiguous(), candidates.contiguous()
    labels, distances = labels.clone(), torch.zeros(len(values))
    places = values.data_ptr(), centres.data_ptr(), len(values), values.shape[1], len(centres)
    found = labels.data_ptr(), distances.data_ptr(), candidates.data_ptr(), candidates.shape[1]
    module.kmeans_refine(*places, *found)
    return labels, distances


def refine_torch(values: Tensor, centres: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """`refine` in torch."""
    half = 0.5 * centres.square().sum(1)
    found = torch.zeros_like(labels)
    step = max(1, _CHUNK // max(1, candidates.shape[1] * values.shape[1]))
    for start in range(0, len(values), step):
        here = slice(start, start + step)
        near = candidates[labels[here]].long()
        scores = half[near] - torch.einsum("nmd,nd->nm", centres[near], values[here])
        found[here] = near.gather(1, scores.argmin(1, keepdim=True))[:, 0]
    return found, (values - centres[found]).square().sum(1)


def _check(values: Tensor, k: int, weights: Tensor | None, iterations: int, batch: int | None) -> None:
    if values.ndim != 2 or values.shape[1] < 1:
        raise InputError("values [n, d], d >= 1", f"{list(values.shape)}", "pass one row each")
    if k < 1 or iterations < 1 or (batch is not None and batch < 1):
        raise InputError("k, iterations and batch of at least 1", f"{k}, {iterations}, {batch}", "raise them")
    if not bool(values.isfinite().all()):
        raise InputError("finite values", "NaN or infinity", "drop those rows first")
    if weights is None:
        return
    if weights.shape != values.shape[:1]:
        raise InputError(f"weights [{len(values)}]", f"{list(weights.shape)}", "pass one weight a row")
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()):
        raise InputError("finite weights from 0 up", "a negative, infinite or NaN weight", "correct them")


def _drawn_rows(rows: Tensor, weights: Tensor, batch: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if batch is None or batch >= len(rows):
        return rows, weights
    chosen = torch.randperm(len(rows), generator=generator)[:batch].to(rows.device)
    return rows[chosen], weights[chosen]


def _start(rows: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows drawn without replacement by weight: the first of exponential arrivals (Efraimidis, Spirakis 2006)."""
    drawn = torch.rand(len(rows), generator=generator, dtype=torch.float64).clamp_min_(1e-300)
    arrival = -drawn.log() / weights.to("cpu", torch.float64).clamp_min(1e-300)
    return rows[arrival.topk(k, largest=False).indices.to(rows.device)].clone()


def _moved(rows: Tensor, weights: Tensor, centres: Tensor, iterations: int, *, exact: bool) -> Tensor:
    """Centres after so many rounds of assignment and averaging."""
    few = min(NEIGHBOURS, len(centres))
    labels, distances = nearest(rows, centres)
    candidates = torch.zeros(0)
    for turn in range(iterations):
        if turn and (exact or few == len(centres)):
            labels, distances = nearest(rows, centres)
        elif turn:
            if turn % _RENEW == 1:
                candidates = _neighbours(centres, few)
            labels, distances = refine(rows, centres, labels, candidates)
        centres, total = _means(rows, weights, labels, centres)
        _fill_(centres, total, rows, distances * weights)
    return centres


def _neighbours(centres: Tensor, count: int) -> Tensor:
    """[k, count] int32: the nearest centres of each, itself among them."""
    half = 0.5 * centres.square().sum(1)
    step = max(1, _CHUNK // len(centres))
    pieces = [(half - piece @ centres.T).topk(count, largest=False, sorted=False)[1] for piece in centres.split(step)]
    return torch.cat(pieces).to(torch.int32)


def _means(rows: Tensor, weights: Tensor, labels: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of the members and their total weight; a centre without weight stays where it is."""
    sums = torch.zeros(len(centres), rows.shape[1], dtype=torch.float64, device=rows.device)
    total = torch.zeros(len(centres), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), 1 << 16):
        here = slice(start, start + (1 << 16))
        mass = weights[here].double()
        total.index_add_(0, labels[here], mass)
        sums.index_add_(0, labels[here], rows[here].double() * mass[:, None])
    mean = sums / total.clamp_min(1e-300)[:, None]
    return torch.where(total[:, None] > 0, mean, centres.double()).to(torch.float32), total


def _fill_(centres: Tensor, total: Tensor, rows: Tensor, badness: Tensor) -> None:
    """Move centres nobody is served by to the rows served worst, as far as any is served badly."""
    empty = torch.nonzero(total == 0)[:, 0]
    if len(empty) == 0:
        return
    worst, places = badness.topk(min(len(empty), len(badness)))
    places = places[worst > 0]
    centres[empty[: len(places)]] = rows[places]
