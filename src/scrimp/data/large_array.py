"""NumPy's own files, mapped into memory: the system reads the pages that a part lies on."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Layout, Reader
from scrimp.data.large_pixels import (
    Box,
    Raw,
    channels_in,
    channels_last,
    cut,
    eight_bits,
    layout_of,
    size_in,
    without_alpha,
)

_BAND_BYTES = 2**22


class ArrayImage(Reader):
    """A ``.npy`` file: [h, w], [h, w, c] or [c, h, w] with c from 1 to 4 (channels last where both would do).

    bool, uint8 or uint16, the last scaled to 8 bits. ``bytes_read`` counts the pages of memory that were touched,
    which the system reads from disk unless it still holds them.
    """

    def _open(self) -> Raw:
        values: Raw = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return values

    def _describe(self, source: Any) -> Layout:
        eight_bits(source.reshape(-1)[:0])
        layout = layout_of(source.shape)
        return Layout((size_in(layout, source.shape),), channels_in(layout, source.shape))

    def _region(self, box: Box, level: int) -> Pixels:
        values = self._source()
        layout = layout_of(values.shape)
        part = values[cut(layout, box)]
        self._count(touched_pages(part) * mmap.PAGESIZE)
        return without_alpha(eight_bits(channels_last(layout, np.asarray(part))))

    def _blocks(self, level: int) -> Iterator[tuple[Box, Pixels]]:
        width, height = self.size
        rows = max(1, _BAND_BYTES * height // self._source().nbytes)
        for top in range(0, height, rows):
            box = (0, top, width, min(rows, height - top))
            yield box, self._region(box, level)


def touched_pages(part: Raw) -> int:
    """Pages of memory that the elements of ``part`` (with strides from 0 on, as slices have) lie on."""
    sides = sorted(zip(part.strides, part.shape, strict=True))
    run = part.itemsize
    while sides and sides[0][0] == run:
        run *= sides.pop(0)[1]
    starts = np.zeros((), np.int64)
    for stride, side in sides:
        starts = np.add.outer(np.arange(side) * stride, starts)
    begins = np.sort(starts.reshape(-1)) + part.__array_interface__["data"][0]
    first, last = begins // mmap.PAGESIZE, (begins + run - 1) // mmap.PAGESIZE
    shared = np.maximum(last[:-1] - first[1:] + 1, 0).sum() if len(first) > 1 else 0
    return int((last - first + 1).sum() - shared)
