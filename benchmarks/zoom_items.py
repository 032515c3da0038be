"""What the makers of large images share: an example with its boxes, fair classes, and items that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

SPLITS = ("train", "test")
FULL = 0.9  # share of its places that an item may find taken: a try then succeeds one time in ten at least


class Box(NamedTuple):
    """What the label rests on: its place in pixels, and the name of what is there."""

    left: int
    top: int
    width: int
    height: int
    label: str


@dataclass(frozen=True, eq=False)
class Example:
    """An image, uint8 [h, w] or [h, w, 3], the number of its class, and the boxes that tell it; none, where the class
    is that there is nothing."""

    pixels: np.ndarray
    label: int
    boxes: tuple[Box, ...]


class Maker(Protocol):
    """Endless images: the same number gives the same image, in any order and in any process."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def make(self, number: int) -> Example: ...


def fair_label(number: int, classes: int, *, seed: int) -> int:
    """A class at random, such that each comes once in numbers 0 to classes - 1, once in the next, and so on."""
    block, place = divmod(number, classes)
    return int(torch.randperm(classes, generator=generator_for(seed, 1, block))[place])


def stream(number: int, *, seed: int) -> torch.Generator:
    """What all but the class of an image is drawn from."""
    return generator_for(seed, 2, number)


def check_split(split: str) -> str:
    if split not in SPLITS:
        raise InputError(" or ".join(SPLITS), repr(split), "pass one of them")
    return split


def uniform(low: float, high: float, *, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def whole_number(below: int, *, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def scattered(sizes: np.ndarray, room: tuple[int, int], *, generator: torch.Generator) -> np.ndarray:
    """Corners at random so that no two items overlap: each is uniform over what those before it left.

    Args:
        sizes: [items, 2], width and height.
        room: width and height of the image.

    Returns:
        Left and top, int64 [items, 2].

    Raises:
        InputError: an item could find more than `FULL` of its places taken.
    """
    free = np.asarray(room) - sizes + 1
    reach = (sizes[:, None] + sizes[None] - 1).prod(-1)
    if (free < 1).any() or (np.tril(reach, -1).sum(1) > FULL * free.prod(1)).any():
        got = f"{len(sizes)} of up to {sizes.max()} pixels on {room[0]} x {room[1]}"
        raise InputError("items that find room", got, "ask for fewer items or a larger image")
    corners = np.empty_like(sizes)
    for item in range(len(sizes)):
        corners[item] = _free_corner(corners[:item], sizes[: item + 1], free[item], generator)
    return corners


def _free_corner(placed: np.ndarray, sizes: np.ndarray, free: np.ndarray, generator: torch.Generator) -> np.ndarray:
    while True:
        corner = (torch.rand(2, generator=generator, dtype=torch.float64).numpy() * free).astype(np.int64)
        apart = (corner + sizes[-1] <= placed) | (placed + sizes[:-1] <= corner)
        if apart.any(1).all():
            return corner
