"""The baseline: every sample alike, in shuffled passes (stronger than independent draws)."""

from __future__ import annotations

import torch

from scrimp.primitives.draw import check_budget
from scrimp.select.selection import Selection


def uniform_sample(count: int, budget: int, *, generator: torch.Generator) -> Selection:
    """Choose ``budget`` of ``count`` samples uniformly, without replacement within each pass over all of them.

    Args:
        count: how many there are to choose from.
        budget: how many to choose; above ``count``, further shuffled passes follow the first.

    Returns:
        Selection of ``budget`` indices (int64) with weights 1 (float32), on the CPU.

    Raises:
        InputError: ``count`` or ``budget`` is below 1.
    """
    check_budget(count)
    check_budget(budget)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-budget // count))]
    return Selection(torch.cat(passes)[:budget], torch.ones(budget))
