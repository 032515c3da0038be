"""The one view of each image that teachers and student both see: a new one every step, or some that come back."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.data import WEAK, View, draw_crops, strong_for, view_of
from scrimp.data.images import Images
from scrimp.data.views import CHANCES
from scrimp.primitives.draw import generator_for

_LIVE, _FIXED, _ORDER = 32, 33, 34  # keys of random streams; the first ones are the loop's and pretraining's


def view_named(name: str, size: int) -> View:
    """``"weak"`` or ``"strong"`` for images of this side in pixels."""
    return {"weak": WEAK, "strong": strong_for(size)}[name]


class LiveViews:
    """A new view of every image in every batch.

    Args:
        view: how it is made.
        seed: of all of them.
        total: images in a batch, over all processes.
    """

    def __init__(self, view: View, *, seed: int, total: int) -> None:
        self.view, self.seed, self.total = view, seed, total

    def made(self, images: Tensor, number: int, place: slice) -> Tensor:
        """uint8 [n, C, H, W], the rows ``place`` of batch ``number`` -> float32 [n, C, H, W] in 0 to 1."""
        generator = generator_for(self.seed, _LIVE, number)
        return view_of(images, self.view, generator=generator, rows=place, total=self.total)


class FixedViews:
    """View 0, 1, 2, ... of every image, each made again whenever it is asked for, in whatever company.

    Only the random numbers of one view at a time are in memory: 52 bytes an image.

    Args:
        images: the set they are of.
        view: how they are made.
        seed: of all of them.
    """

    def __init__(self, images: Images, view: View, *, seed: int) -> None:
        self.count, self.shape = len(images), images.shape
        self.view, self.seed = view, seed
        self._number = -1
        self._crops = self._chances = torch.empty(0)

    def made(self, images: Tensor, rows: Tensor, number: int) -> Tensor:
        """View ``number`` of these images.

        Args:
            images: uint8 [n, C, H, W].
            rows: which of the set they are, int64 [n], on the CPU.

        Returns:
            float32 [n, C, H, W] in 0 to 1, where the images are.
        """
        if number != self._number:
            self._draw(number)
        generator = generator_for(self.seed, _ORDER, number)
        crops, chances = self._crops[rows], self._chances[rows]
        return view_of(images, self.view, generator=generator, crops=crops, chances=chances)

    def _draw(self, number: int) -> None:
        _, height, width = self.shape
        generator = generator_for(self.seed, _FIXED, number)
        self._crops = draw_crops(self.count, self.view, height=height, width=width, generator=generator)
        self._chances = torch.rand(self.count, CHANCES, generator=generator)
        self._number = number
