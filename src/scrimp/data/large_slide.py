"""Whole-slide images of scanners, read through OpenSlide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Layout, Reader
from scrimp.data.large_pixels import Box, without_alpha
from scrimp.primitives.errors import require

_BLOCK = 1024  # side in pixels of the pieces that a thumbnail is made of
_CACHE_BYTES = 2**25


class SlideImage(Reader):
    """Any file that OpenSlide reads. What the scanner left out is white, as in slide viewers.

    OpenSlide hides how much it reads (``bytes_read`` is ``None``) and keeps decoded tiles in a cache of its own, 32 MB
    an image; the argument ``cache`` is not used.
    """

    counts_bytes = False

    def _open(self) -> Any:
        openslide = require("openslide", "slides")
        slide = openslide.OpenSlide(self.path)
        slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        return slide

    def _describe(self, source: Any) -> Layout:
        return Layout(tuple((int(width), int(height)) for width, height in source.level_dimensions), 3)

    def _region(self, box: Box, level: int) -> Pixels:
        left, top, width, height = box
        slide = self._source()
        scale = slide.level_downsamples[level]
        picture = slide.read_region((round(left * scale), round(top * scale)), level, (width, height))
        return without_alpha(np.asarray(picture))

    def _blocks(self, level: int) -> Iterator[tuple[Box, Pixels]]:
        width, height = self.levels[level]
        for top in range(0, height, _BLOCK):
            for left in range(0, width, _BLOCK):
                box = (left, top, min(_BLOCK, width - left), min(_BLOCK, height - top))
                yield box, self._region(box, level)
