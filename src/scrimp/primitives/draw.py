"""Random draws of indices: every one from a given generator, so that a seed fixes the outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator fixed by whole numbers, such as (seed, round): a stateless stream for each key.

    The keys are mixed by SplitMix64 (Steele, Lea, Flood 2014), so that near keys give unrelated streams.
    """
    state = 0
    for key in keys:
        state = _splitmix64((state ^ (key & _MASK)) & _MASK)
    return torch.Generator().manual_seed(state & 0x7FFF_FFFF_FFFF_FFFF)


_MASK = (1 << 64) - 1


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def draw_with_replacement(probabilities: Tensor, budget: int, *, generator: torch.Generator) -> Tensor:
    """``budget`` independent draws.

    Inverse transform in float64, not ``torch.multinomial``: that one is limited to 2**24 categories.

    Args:
        probabilities: [count], summing to 1.
        budget: number of draws.

    Returns:
        Indices [budget], int64, on the device of ``probabilities``.
    """
    cumulative = probabilities.detach().to("cpu", torch.float64).cumsum(0)
    points = torch.rand(budget, generator=generator, dtype=torch.float64) * cumulative[-1]
    return _locate(cumulative, points).to(probabilities.device)


def draw_systematic(probabilities: Tensor, budget: int, *, generator: torch.Generator) -> Tensor:
    """``budget`` draws whose counts are as even as they can be: index i comes floor or ceil of budget * p_i times.

    Systematic sampling on a random order (Madow 1949): the expected count is exactly budget * p_i, as with independent
    draws, and the spread around it is below one. Equal probabilities and budget = count give a permutation.

    Args:
        probabilities: [count], summing to 1.
        budget: number of draws.

    Returns:
        Indices [budget], int64, shuffled, on the device of ``probabilities``.
    """
    host = probabilities.detach().to("cpu", torch.float64)
    order = torch.randperm(len(host), generator=generator)
    cumulative = host[order].cumsum(0)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(budget, dtype=torch.float64) + offset) * (cumulative[-1] / budget)
    drawn = order[_locate(cumulative, points)]
    return drawn[torch.randperm(budget, generator=generator)].to(probabilities.device)


def _locate(cumulative: Tensor, points: Tensor) -> Tensor:
    """The interval of the cumulative sum each point falls in; intervals of no width are never hit."""
    found = torch.searchsorted(cumulative, points, right=True)
    last = int(torch.searchsorted(cumulative, cumulative[-1:])[0])
    return found.clamp_max_(last)


def check_scores(scores: Tensor) -> None:
    """Refuse scores that are no vector of finite numbers from 0 up."""
    if scores.ndim != 1 or scores.numel() == 0:
        raise InputError(
            "scores of shape [count], count >= 1", f"shape {list(scores.shape)}", "pass one score a sample"
        )
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise InputError("finite scores >= 0", "a negative, infinite or NaN score", "check the model's loss")


def check_budget(budget: int) -> None:
    """Refuse a budget below one draw."""
    if budget < 1:
        raise InputError("a budget of at least 1", f"{budget}", "ask for one sample or more")
