"""One of the 24 ways to write down the same Gaussian: axes from the longest to the shortest, least rotation.

Which axis is called x is arbitrary, and so is the sign of two of them: a Gaussian rotated by a symmetry of the cube,
its scales exchanged to match, is the same Gaussian. Writing all of them in one way saves up to log2(24) = 4.6 bits each
and changes no picture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from scrimp.splats.codec import by_rows
from scrimp.splats.scene import Splats

_HALF, _ROOT = 0.5, math.sqrt(0.5)
_TURNS = torch.tensor(
    [
        [1, 0, 0, 0],
        [_HALF, _HALF, _HALF, _HALF],
        [_HALF, -_HALF, -_HALF, -_HALF],
        [_ROOT, _ROOT, 0, 0],
        [_ROOT, 0, _ROOT, 0],
        [_ROOT, 0, 0, _ROOT],
    ]
)
# The axes that become x, y and z under each turn, as three digits.
_AXES = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0], [1, 0, 2]])


def canonical(splats: Splats) -> Splats:
    """The same Gaussians with their scales in descending order, and w the largest component of unit quaternions.

    Positions, colours and opacities stay as they are; covariances do up to rounding.
    """
    both = by_rows(_turned, splats.scales, splats.quaternions)
    return replace(splats, scales=both[:, :3].contiguous(), quaternions=both[:, 3:].contiguous())


def _turned(scales: Tensor, quaternions: Tensor) -> Tensor:
    """[n, 7]: scales, and quaternions to match."""
    order = scales.argsort(dim=1, descending=True, stable=True)
    code = order @ order.new_tensor([9, 3, 1])
    known = (_AXES @ torch.tensor([9, 3, 1])).to(order.device)
    turn = (code[:, None] == known).int().argmax(1)
    turned = quaternion_product(quaternions, _TURNS.to(quaternions)[turn])
    # Half a turn about an axis of its own brings any component to the front.
    largest = turned.abs().argmax(1)
    flips = torch.diag(turned.new_tensor([1, -1, -1, -1]))
    upright = quaternion_product(turned, flips[largest])
    unit = upright / upright.norm(dim=1, keepdim=True)
    return torch.cat([scales.gather(1, order), torch.where(unit[:, :1] < 0, -unit, unit)], 1)


def quaternion_product(left: Tensor, right: Tensor) -> Tensor:
    """[n, 4], w x y z: first the rotation ``right``, then ``left``."""
    a, b = left[:, :1], right[:, :1]
    u, v = left[:, 1:], right[:, 1:]
    real = a * b - (u * v).sum(1, keepdim=True)
    return torch.cat([real, a * v + b * u + torch.linalg.cross(u, v)], 1)
