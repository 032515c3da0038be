"""Unit quaternions as the three components that are smallest, and which one was left out.

q and -q are the same rotation, so the largest component is made positive and follows from the other three, none of
which exceeds 1 / sqrt(2). .sog, .spz from version 3 and compressed .ply store rotations so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_OTHERS = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


def split(quaternions: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the largest component out.

    Args:
        quaternions: [n, 4], of any length but 0, in any order of components.

    Returns:
        Which one is the largest, [n] int64, and the others times sqrt(2), [n, 3] in their order, from -1 to 1.
    """
    unit = quaternions / quaternions.norm(dim=1, keepdim=True)
    largest = unit.abs().argmax(1, keepdim=True)
    sign = torch.where(unit.gather(1, largest) < 0, -math.sqrt(2), math.sqrt(2))
    others = unit.gather(1, _OTHERS.to(largest.device)[largest[:, 0]]) * sign
    return largest[:, 0], others.clamp(-1, 1)


def join(largest: Tensor, others: Tensor) -> Tensor:
    """Unit quaternions [n, 4] of what `split` returns; of the length they have where the three alone exceed 1."""
    three = others / math.sqrt(2)
    rest = (1 - three.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    whole = three.new_empty(len(three), 4)
    whole.scatter_(1, largest.long()[:, None], rest)
    return whole.scatter_(1, _OTHERS.to(largest.device)[largest.long()], three)


def pack(quaternions: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels 0 to 2**bits - 1, evenly from -1 / sqrt(2) to 1 / sqrt(2), rounded.

    Returns:
        Which component is the largest, [n] int64, and the levels of the others, [n, 3] int64.
    """
    largest, others = split(quaternions)
    return largest, ((others + 1) * (0.5 * (2**bits - 1))).round().long()


def unpack(largest: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Unit quaternions [n, 4] float32 of what `pack` returns."""
    return join(largest, levels.float() * (2 / (2**bits - 1)) - 1)


def pack_signed(quaternions: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `pack`, but levels of a sign in the highest bit and a magnitude below it, so that 0 is a level."""
    largest, others = split(quaternions)
    size = (others.abs() * (2 ** (bits - 1) - 1)).round().long()
    return largest, size + ((others < 0) & (size > 0)).long() * 2 ** (bits - 1)


def unpack_signed(largest: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Unit quaternions [n, 4] float32 of what `pack_signed` returns."""
    half = 2 ** (bits - 1)
    size = (levels % half).float() / (half - 1)
    return join(largest, torch.where(levels >= half, -size, size))
