"""Images that nobody had to optimise: flat colours and noise, which a policy may find dear by themselves."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from scrimp.attack.pixels import check_images, quantise
from scrimp.primitives.errors import InputError


def flat_colours(images: Tensor, *, levels: int = 3) -> Tensor:
    """Images of one colour each: all that have ``levels`` even steps from 0 to 1 in each channel.

    Args:
        images: [n, channels, height, width], for the shape, dtype and device.
        levels: from 2; the number of images is levels ** channels, at most 4096.

    Returns:
        [levels ** channels, channels, height, width], on the 256 levels.

    Raises:
        InputError: levels out of range.
    """
    check_images(images[:1])
    channels = images.shape[1]
    if levels < 2 or levels**channels > 4096:
        raise InputError("levels from 2, and levels ** channels up to 4096", f"{levels} ** {channels}", "correct them")
    steps = torch.linspace(0, 1, levels, dtype=torch.float64).tolist()
    colours = torch.tensor(list(product(steps, repeat=channels)), dtype=torch.float64)
    return quantise(colours).to(images)[:, :, None, None].expand(-1, -1, *images.shape[2:]).contiguous()


def noise_images(images: Tensor, count: int, *, generator: torch.Generator, smooth: int = 1) -> Tensor:
    """Images of noise: squares of ``smooth`` pixels, each channel uniform on the 256 levels.

    Args:
        images: [n, channels, height, width], for the shape, dtype and device.
        count: how many.
        generator: on the CPU.
        smooth: side of the squares in pixels, from 1.

    Returns:
        [count, channels, height, width].

    Raises:
        InputError: a count below 0, or squares below 1.
    """
    check_images(images[:1])
    if count < 0 or smooth < 1:
        raise InputError("a count from 0 and smooth from 1", f"{count} and {smooth}", "correct them")
    height, width = images.shape[2:]
    grid = (count, images.shape[1], -(-height // smooth), -(-width // smooth))
    noise = torch.randint(256, grid, generator=generator)
    noise = noise.repeat_interleave(smooth, 2).repeat_interleave(smooth, 3)[:, :, :height, :width]
    return quantise(noise.double() / 255).to(images)
