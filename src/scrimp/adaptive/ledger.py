"""FLOPs by image, from how many tokens each block saw; 1 multiply-add = 2 FLOPs, pointwise work is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.adaptive.host import Block
from scrimp.primitives.errors import InputError

Number = int | tuple[int, ...] | Tensor


class Count(NamedTuple):
    """Tokens of one block, prefix included: one number for all images, numbers by image, or a tensor [images].

    Attributes:
        entering: that attention saw as keys, and the layers before it.
        queries: that asked, and went through the projection.
        leaving: that went through the layers after the midpoint.
        own: FLOPs of the method's own matrix products, less those it saved in other ways than by tokens.
    """

    entering: Number
    queries: Number
    leaving: Number
    own: Number = 0


def flops(blocks: Sequence[Block], counts: Sequence[Count], images: int) -> Tensor:
    """FLOPs inside the blocks, [images], int64."""
    total = torch.zeros(images, dtype=torch.int64)
    for block, count in zip(blocks, counts, strict=True):
        entering, queries, leaving, own = (_whole(number, images) for number in count[:4])
        if not block.middle:
            queries = leaving = entering
        attention = block.before * entering + block.pair * entering * queries + block.between * queries
        total += attention + block.after * leaving + block.fixed + block.shared + own
    return total


def _whole(number: Number, images: int) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to("cpu", torch.int64)
    whole = torch.tensor(number, dtype=torch.int64)
    return whole.expand(images) if whole.ndim == 0 else whole


def cap_for(price: Callable[[int], int], most: int, budget: int) -> int:
    """The largest cap from 1 to ``most`` whose price fits the budget.

    Raises:
        InputError: not even a cap of 1 does.
    """
    low, high = 1, max(most, 1)
    if price(low) > budget:
        raise InputError(f"max_flops of at least {price(low)}, the least possible", str(budget), "allow more")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(middle) <= budget else (low, middle - 1)
    return low
