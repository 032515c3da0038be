"""Attacks that only ask what an image costs: no gradients, no weights, a budget of queries (as Square Attack, 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scrimp.attack.patch import Patch, Place, places_for, random_patch
from scrimp.attack.perturbation import Perturbation
from scrimp.attack.pixels import check_epsilon, check_images, paste, to_ball
from scrimp.attack.victim import Cost, costs_of
from scrimp.primitives.errors import InputError

_HALVED = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the budget after which squares have half the area


def query_patch(
    cost: Cost,
    images: Tensor,
    *,
    size: int | tuple[int, int],
    generator: torch.Generator,
    queries: int = 1000,
    place: Place = (0, 0),
    share: float = 0.8,
    batch: int = 64,
) -> Patch:
    """One patch for every image, found by random search on the mean of the costs.

    Starts from stripes of extreme colours; then a random square of the patch gets a random extreme colour, and stays
    where the mean cost does not fall (Andriushchenko et al. 2020, section 3, on a patch and on costs). Squares shrink
    as the budget is used.

    Args:
        cost: images to [n], such as ``victim.cost`` or seconds measured from outside.
        images: to learn from, [n, channels, height, width], from 0 to 1, n >= 1; not written to.
        size: side of the patch in pixels, or height and width.
        generator: on the CPU.
        queries: how often the cost of every image is asked, from 1.
        place: top and left.
        share: of the patch's area, of the first squares; above 0 and up to 1.
        batch: images at a time.

    Returns:
        The dearest patch; its ``trace`` is the best mean cost after each query.

    Raises:
        InputError: arguments out of range, or a patch that does not fit.
    """
    _check(images, queries, share)
    images = images.detach()
    shape = random_patch(images, size=size, generator=generator).pixels.shape
    places = places_for(images, shape, place)
    pixels = _stripes(1, shape, generator).to(images)[0]
    best = float(costs_of(cost, paste(images, pixels, places), batch=batch).double().mean())
    trace = [best]
    for query in range(1, queries):
        found = pixels.clone()
        top, left, side = _square(shape, share, query / queries, generator)
        colour = torch.randint(2, (shape[0], 1, 1), generator=generator).to(pixels)
        found[:, top : top + side, left : left + side] = colour
        got = float(costs_of(cost, paste(images, found, places), batch=batch).double().mean())
        if got >= best:
            pixels, best = found, got
        trace.append(best)
    return Patch(pixels, place, tuple(trace))


def query_perturb(
    cost: Cost,
    images: Tensor,
    *,
    epsilon: float,
    generator: torch.Generator,
    queries: int = 1000,
    share: float = 0.8,
    batch: int = 64,
) -> Perturbation:
    """A perturbation of each image in the l-infinity ball, found by random search on its own cost.

    As `query_patch`, with plus and minus epsilon for the extreme colours (Andriushchenko et al. 2020, section 3).

    Args:
        cost: images to [n], such as ``victim.cost``.
        images: [n, channels, height, width], from 0 to 1, n >= 1; not written to.
        epsilon: radius, from 1/255.
        generator: on the CPU.
        queries: how often the cost of each image is asked, from 1.
        share: of an image's area, of the first squares; above 0 and up to 1.
        batch: images at a time.

    Raises:
        InputError: arguments out of range.
    """
    check_epsilon(epsilon)
    _check(images, queries, share)
    images = images.detach()
    deltas = (2 * _stripes(len(images), images.shape[1:], generator) - 1).to(images) * epsilon
    best = costs_of(cost, to_ball(images + deltas, images, epsilon), batch=batch)
    for query in range(1, queries):
        found = deltas.clone()
        for one in found:
            top, left, side = _square(images.shape[1:], share, query / queries, generator)
            sign = 2 * torch.randint(2, (len(one), 1, 1), generator=generator).to(one) - 1
            one[:, top : top + side, left : left + side] = sign * epsilon
        got = costs_of(cost, to_ball(images + found, images, epsilon), batch=batch)
        better = got >= best
        best = torch.where(better, got, best)
        deltas = torch.where(better.to(deltas.device)[:, None, None, None], found, deltas)
    return Perturbation(deltas, epsilon)


def _check(images: Tensor, queries: int, share: float) -> None:
    check_images(images)
    if not len(images) or queries < 1 or not 0 < share <= 1:
        saw = f"{len(images)} images, queries={queries}, share={share}"
        raise InputError("1 image or more, queries from 1, share above 0 and up to 1", saw, "correct them")


def _stripes(count: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """[count, channels, h, w] of 0 and 1, every column of one colour."""
    channels, height, width = shape
    return torch.randint(2, (count, channels, 1, width), generator=generator).expand(-1, -1, height, -1).contiguous()


def _square(shape: torch.Size, share: float, spent: float, generator: torch.Generator) -> tuple[int, int, int]:
    """Top, left and side of the next square, when ``spent`` of the budget is."""
    _, height, width = shape
    area = share * height * width / 2 ** sum(spent > mark for mark in _HALVED)
    side = min(height, width, max(1, round(math.sqrt(area))))
    top, left = (int(torch.randint(most - side + 1, (), generator=generator)) for most in (height, width))
    return top, left, side
