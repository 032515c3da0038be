"""Numbers in 8 bits as several formats store them: opacities, and codes of a codebook for single numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.splats.activations import logits_of

CODES = 256
_ROUNDS, _QUANTILES = 100, 1024


def opacity_levels(logits: Tensor) -> Tensor:
    """Opacities in steps of 1 / 255, rounded: uint8, of the same shape."""
    return (logits.float().sigmoid() * 255).round().to(torch.uint8)


def opacity_logits(levels: Tensor) -> Tensor:
    """Logits, float32, of what `opacity_levels` returns; of the outermost levels the limits of `MOST_LOGIT`."""
    table = torch.from_numpy(logits_of(torch.arange(256) / 255))
    return table.to(levels.device)[levels.long()]


def number_codebook(values: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """256 numbers that stand for many with a small squared error: Lloyd's iterations on sorted numbers.

    On sorted numbers a cell is a range and its mean a difference of two running sums, so that an iteration costs 256
    searches however many numbers there are. The start is the best density of codes for many of them, the cube root of
    the numbers' own (Panter and Dite 1951).

    Args:
        values: of any shape, finite.
        weights: of the same shape, >= 0; all equal if not given.

    Returns:
        [256] float32, ascending. Where there are no more than 256 different numbers, exactly these, the last repeated.
    """
    flat = values.reshape(-1).double()
    distinct = flat.unique()
    if len(distinct) <= CODES:
        last = distinct[-1:] if len(distinct) else distinct.new_zeros(1)
        return torch.cat([distinct, last.expand(CODES - len(distinct))]).float()
    flat, order = flat.sort()
    each = torch.ones_like(flat) if weights is None else weights.reshape(-1).double()[order]
    if not bool(each.sum() > 0):
        each = torch.ones_like(flat)
    return _lloyd(flat, each, _start(flat, each)).float()


def _start(flat: Tensor, each: Tensor) -> Tensor:
    """[256] codes as dense as the cube root of the numbers' density, which is measured between quantiles."""
    bins = min(_QUANTILES, len(flat) // 8)
    running = each.cumsum(0)
    rank = torch.searchsorted(running, torch.linspace(0, 1, bins + 1, dtype=flat.dtype) * running[-1])
    rank[0], rank[-1] = 0, len(flat) - 1  # whatever the weights of the outermost
    edges = flat[rank]
    share = torch.cat([flat.new_zeros(1), edges.diff().pow(2 / 3).cumsum(0)])
    wanted = (torch.arange(CODES, dtype=flat.dtype) + 0.5) * (share[-1] / CODES)
    after = torch.searchsorted(share, wanted).clamp(1, bins)
    within = (wanted - share[after - 1]) / (share[after] - share[after - 1])
    return edges[after - 1] + within * (edges[after] - edges[after - 1])


def _lloyd(flat: Tensor, each: Tensor, codes: Tensor) -> Tensor:
    total = torch.cat([each.new_zeros(1), each.cumsum(0)])
    summed = torch.cat([each.new_zeros(1), (each * flat).cumsum(0)])
    for _ in range(_ROUNDS):
        inner = torch.searchsorted(flat, (codes[1:] + codes[:-1]) / 2)
        bounds = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(flat))])
        weight = total[bounds[1:]] - total[bounds[:-1]]
        moved = torch.where(weight > 0, (summed[bounds[1:]] - summed[bounds[:-1]]) / weight.clamp(min=1e-300), codes)
        moved, previous = moved.sort().values, codes
        codes = moved
        if bool((moved - previous).abs().max() <= 1e-6 * (flat[-1] - flat[0])):
            break
    return codes


def nearest_codes(values: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest number of an ascending codebook [256], uint8, of the same shape."""
    between = (codebook[1:] + codebook[:-1]) / 2
    return torch.searchsorted(between, values.to(between.dtype).contiguous()).to(torch.uint8)
