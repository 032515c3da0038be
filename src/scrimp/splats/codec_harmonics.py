"""Harmonics in few bytes: rotated to their principal axes and rounded, or as entries of a palette."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp import native
from scrimp.splats.codebooks import kmeans

_ROWS = 1 << 13
_NEAREST = 0.42
"""Rounded up from this part above a step: zeros are the cheapest numbers (a dead zone; error below 0.58 steps)."""


AXIS_STEP = 2.0**-9
"""What axes are rounded to: 0.5 % of a coefficient, and half the bytes of half precision."""


def principal_axes(flat: Tensor, weights: Tensor, *, order: Tensor | None = None) -> Tensor:
    """[d, d] float16, multiples of `AXIS_STEP`, columns: directions of the greatest weighted energy first, about 0.

    Args:
        flat: [n, d].
        weights: [n], of squared errors, in the order below.
        order: [n] int64, of the rows; as they are where omitted. Sums depend on it in their last digits.
    """
    energy = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64)
    for start in range(0, len(flat), _ROWS):
        rows = _taken(flat, order, start)
        energy += (rows.T @ (rows * weights[start : start + _ROWS, None].to(rows))).double()
    vectors = torch.linalg.eigh(energy).eigenvectors.flip(1)
    # A vector and its negative serve alike; this makes them the same on every machine.
    sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return ((vectors * sign / AXIS_STEP).round() * AXIS_STEP).half()


def rotated_numbers(flat: Tensor, axes: Tensor, step: float, shifts: Tensor, *, order: Tensor | None = None) -> Tensor:
    """[n, d] int32: coefficients along the axes in steps of ``step * 2 ** shift``, shifts [n] in that order."""
    found = torch.empty(flat.shape, dtype=torch.int32)
    for start in range(0, len(flat), _ROWS):
        here = slice(start, start + _ROWS)
        steps = (_taken(flat, order, start) @ axes.float()) / (step * torch.exp2(shifts[here].float()))[:, None]
        found[here] = (steps.abs() + _NEAREST).floor().mul_(steps.sign()).clamp_(-(2**21), 2**21).int()
    return found


def _taken(flat: Tensor, order: Tensor | None, start: int) -> Tensor:
    """A piece of the rows in order: a scene's harmonics are most of it, and never copied whole."""
    here = slice(start, start + _ROWS)
    return (flat[here] if order is None else flat[order[here]]).float()


def rotated_from(numbers: Tensor, axes: Tensor, counts: Tensor, steps: Tensor) -> Tensor:
    """[n, d] float32.

    Args:
        numbers: [n, m] int32, 0 from the ``counts`` on.
        axes: [d, m] float32.
        counts: [n] uint8 up to m.
        steps: [n] float32.
    """
    module = native.load()
    if module is None:
        return rotated_from_torch(numbers, axes, steps)
    found, directions = torch.empty(len(numbers), len(axes)), axes.T.contiguous()
    places = counts.data_ptr(), steps.data_ptr(), directions.data_ptr()
    module.range_rotate_rows(numbers.data_ptr(), found.data_ptr(), *numbers.shape, len(axes), *places)
    return found


def rotated_from_torch(numbers: Tensor, axes: Tensor, steps: Tensor) -> Tensor:
    """`rotated_from` in torch."""
    pieces = zip(numbers.split(_ROWS), steps.split(_ROWS), strict=True)
    return torch.cat([(piece * each[:, None]) @ axes.T for piece, each in pieces])


def used_counts(numbers: Tensor) -> Tensor:
    """[n] uint8: columns up to the last that is not 0."""
    places = torch.arange(1, numbers.shape[1] + 1, dtype=torch.uint8)
    found = torch.zeros(len(numbers), dtype=torch.uint8)
    for start in range(0, len(numbers), _ROWS) if numbers.shape[1] else ():
        here = slice(start, start + _ROWS)
        found[here] = ((numbers[here] != 0) * places).amax(1)
    return found


def palette_of(flat: Tensor, weights: Tensor, entries: int, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Centres, the most used first, and labels, 0 for the Gaussians left without harmonics.

    Args:
        flat: [n, d].
        weights: [n], of squared errors.
        entries: of the palette at most.
        threshold: of the root of weight times energy, below which nothing is seen.

    Returns:
        [k, d] float32 and [n] int32 from 0 to k.
    """
    seen = flat.square().sum(1) * weights > threshold**2
    chosen = torch.nonzero(seen)[:, 0]
    labels = torch.zeros(len(flat), dtype=torch.int32)
    if len(chosen) == 0:
        return flat[:0], labels
    centres, found = kmeans(flat[chosen], min(entries, len(chosen)), weights=weights[chosen], seed=0)
    sizes = torch.bincount(found, minlength=len(centres))
    order = sizes.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    labels[chosen] = rank[found].int() + 1
    return centres[order[: int((sizes > 0).sum())]], labels
