"""Ordinary image files (JPEG, PNG, WebP ...): they can only be decoded whole, once, and kept while there is room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from scrimp.data.decode import decode_image, peek_image
from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Layout, Reader
from scrimp.data.large_pixels import Box

_TINY = (1, 1)


class OrdinaryImage(Reader):
    """A file that PIL reads, as `scrimp.data.decode.decode_image` has it: EXIF orientation applied, 16-bit grey scaled.

    The first part read decodes the whole file, which the cache keeps. A thumbnail of a JPEG is decoded at a fraction
    of its size by libjpeg, without keeping anything; its edges are cut by less than half of its pixels where the
    ratio of the sides is rounded. ``bytes_read`` grows by the whole file each time it is decoded.
    """

    def _open(self) -> None:
        return None

    def _describe(self, source: None) -> Layout:
        head = peek_image(self.path)
        if head is None:
            decode_image(self.path, size=_TINY, mode="L")  # says why
            raise ValueError("no image format recognised")
        height, width = head.size
        return Layout(((width, height),), 1 if head.grey else 3)

    def _region(self, box: Box, level: int) -> Pixels:
        self._source()  # a closed image is closed, whatever is still in memory
        whole = self.cache.get(self._identity, partial(self._pixels, self.size))
        left, top, width, height = box
        return whole[top : top + height, left : left + width]

    def _blocks(self, level: int) -> Iterator[tuple[Box, Pixels]]:
        yield (0, 0, *self.size), self._region((0, 0, *self.size), level)

    def _shrunk(self, to: tuple[int, int], level: int) -> Tensor:
        self._source()
        return torch.from_numpy(self._pixels(to)).permute(2, 0, 1).contiguous()

    def _pixels(self, size: tuple[int, int]) -> Pixels:
        mode = "L" if self.channels == 1 else "RGB"
        pixels = decode_image(self.path, size=(size[1], size[0]), mode=mode)
        self._count(os.path.getsize(self.path))
        return pixels.permute(1, 2, 0).numpy()
