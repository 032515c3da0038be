"""Smoothing the input: a defence without training, and a victim that an attacker who knows of it attacks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.attack.victim import Victim
from scrimp.primitives.errors import InputError


def median_filter(images: Tensor, size: int = 3) -> Tensor:
    """Each pixel of each channel becomes the median of the ``size`` x ``size`` around it; edges are repeated.

    Args:
        images: [n, channels, height, width].
        size: odd, from 1.

    Returns:
        of the same shape, differentiable: the gradient is that of the pixel taken.

    Raises:
        InputError: an even size, or one below 1.
    """
    if size < 1 or size % 2 == 0:
        raise InputError("an odd size from 1", str(size), "correct it")
    if not images.numel():
        return images.clone()
    wide = functional.pad(images, (size // 2,) * 4, mode="replicate")
    return wide.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(-1).values


def gaussian_filter(images: Tensor, sigma: float = 1.0) -> Tensor:
    """A Gaussian blur, cut off at 3 sigma; edges are repeated.

    Args:
        images: [n, channels, height, width].
        sigma: standard deviation in pixels, from 0, which changes nothing.

    Returns:
        of the same shape, differentiable.

    Raises:
        InputError: a sigma below 0 or without end.
    """
    if not 0 <= sigma < math.inf:
        raise InputError("a sigma from 0", str(sigma), "correct it")
    radius = math.ceil(3 * sigma)
    if radius == 0 or not images.numel():
        return images.clone()
    place = torch.arange(-radius, radius + 1, dtype=torch.float64)
    bell = (-0.5 * (place / sigma) ** 2).softmax(0).to(images)
    channels = images.shape[1]
    wide = functional.pad(images, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(wide, bell.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return functional.conv2d(rows, bell.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


class Filtered:
    """A victim whose images go through a filter first. The filter's FLOPs are not counted: they are the same for all.

    An attack on it is that of one who knows the defence, by gradients through the filter; an attack made on the bare
    victim and tried on this one is that of one who does not.

    Args:
        victim: behind the filter.
        filter: images to images, differentiable where gradients are wanted.
    """

    def __init__(self, victim: Victim, filter: Callable[[Tensor], Tensor]) -> None:
        self.victim, self.filter = victim, filter

    @property
    def model(self) -> nn.Module:
        """See `scrimp.attack.Victim`."""
        return self.victim.model

    @property
    def full(self) -> int:
        """See `scrimp.attack.Victim`."""
        return self.victim.full

    @property
    def ceiling(self) -> int | None:
        """See `scrimp.attack.Victim`."""
        return self.victim.ceiling

    def cost(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        return self.victim.cost(self.filter(images))

    def policy_loss(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        return self.victim.policy_loss(self.filter(images))

    def logits(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        return self.victim.logits(self.filter(images))
