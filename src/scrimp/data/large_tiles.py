"""Images stored in tiles: only the tiles that a part touches are read and decoded, and kept for the next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Reader
from scrimp.data.large_pixels import Box


class Tile(NamedTuple):
    """Which tile of an image."""

    level: int
    row: int
    column: int


class TiledReader(Reader):
    """The part of `Reader` that follows from the size of a tile and from how one is read."""

    @abstractmethod
    def _tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles of a level."""

    @abstractmethod
    def _decode(self, tile: Tile, box: Box) -> Pixels:
        """Read a tile, [h, w, C] of the pixels in ``box`` (the tile as far as it lies inside the image)."""

    def _region(self, box: Box, level: int) -> Pixels:
        left, top, width, height = box
        canvas = np.empty((height, width, self.channels), np.uint8)
        for tile, (x, y, w, h) in self._touched(box, level):
            pixels = self.cache.get((*self._identity, tile), partial(self._load, tile))
            x0, x1, y0, y1 = max(x, left), min(x + w, left + width), max(y, top), min(y + h, top + height)
            canvas[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0 - y : y1 - y, x0 - x : x1 - x]
        return canvas

    def _blocks(self, level: int) -> Iterator[tuple[Box, Pixels]]:
        for tile, box in self._touched((0, 0, *self.levels[level]), level):
            kept = self.cache.find((*self._identity, tile))
            yield box, self._load(tile) if kept is None else kept

    def _touched(self, box: Box, level: int) -> Iterator[tuple[Tile, Box]]:
        """The tiles that ``box`` touches, and where each lies."""
        left, top, width, height = box
        across, down = self._tile_size(level)
        for row in range(top // down, (top + height - 1) // down + 1):
            for column in range(left // across, (left + width - 1) // across + 1):
                tile = Tile(level, row, column)
                yield tile, self._place(tile)

    def _place(self, tile: Tile) -> Box:
        (across, down), (width, height) = self._tile_size(tile.level), self.levels[tile.level]
        left, top = tile.column * across, tile.row * down
        return left, top, min(across, width - left), min(down, height - top)

    def _load(self, tile: Tile) -> Pixels:
        box = self._place(tile)
        pixels = self._decode(tile, box)
        wanted = (box[3], box[2], self.channels)
        if pixels.shape != wanted:
            raise ValueError(f"a tile {list(pixels.shape)} where {list(wanted)} was to be")
        return pixels.copy()  # a view would keep the whole of what it was cut from
