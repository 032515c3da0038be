"""Order along Morton's curve: Gaussians near one another in space become neighbours in the file."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 21  # an axis; three fit an int64
_SPREAD = (
    (32, 0x1F00000000FFFF),
    (16, 0x1F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)
"""Shifts and masks that leave two empty bits after each of 21."""


def morton_order(means: Tensor) -> Tensor:
    """The permutation that sorts positions by their Morton code, 21 bits an axis, each axis over its own range.

    Args:
        means: [n, 3]. Rows that are not finite come last.

    Returns:
        int64 [n]: ``means[morton_order(means)]`` is sorted; equal codes keep their order.
    """
    if not len(means):
        return torch.zeros(0, dtype=torch.int64, device=means.device)
    good = means.isfinite().all(1, keepdim=True)
    values = torch.where(good, means, 0).double()
    low = torch.where(good, values, torch.inf).amin(0)
    width = torch.where(good, values, -torch.inf).amax(0) - low
    cells = ((values - low) / torch.where(width > 0, width, 1) * (2**_BITS - 1)).round()
    spread = _spread(torch.where(good, cells, 0).long())
    codes = (spread << torch.arange(3, device=means.device)).sum(1)
    return torch.argsort(codes.masked_fill(~good[:, 0], 2**63 - 1), stable=True)


def _spread(cells: Tensor) -> Tensor:
    for shift, mask in _SPREAD:
        cells = (cells | (cells << shift)) & mask
    return cells
