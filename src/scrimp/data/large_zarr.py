"""Zarr arrays and groups of arrays (multiscale images), read chunk by chunk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Layout
from scrimp.data.large_pixels import Box, channels_in, channels_last, cut, eight_bits, layout_of, size_in, without_alpha
from scrimp.data.large_tiles import Tile, TiledReader
from scrimp.primitives.errors import require

_ABOUT = re.compile(r"(zarr\.json|\.z(array|group|attrs|metadata))$")


class _Level(NamedTuple):
    """An array, the index that leaves its picture alone, and the axes of that."""

    array: Any
    where: tuple[int | slice, ...]
    layout: str
    shape: tuple[int, ...]


class ZarrImage(TiledReader):
    """A zarr folder, format 2 or 3: an array, or a group with one array a level.

    A group lists its levels as OME-Zarr does (``multiscales``), or all its arrays are levels, largest first. Axes are
    those of OME-Zarr (one time and one depth only), else [h, w], [h, w, c] or [c, h, w] with c from 1 to 4 (channels
    last where both would do). bool, uint8 or uint16, the last scaled to 8 bits. Chunks that the folder lacks hold the
    array's fill value: zarr itself cannot tell a lost chunk from an empty one. ``bytes_read`` leaves out metadata.
    """

    def _open(self) -> tuple[_Level, ...]:
        zarr = require("zarr", "zoom")
        store = _counting(zarr.storage.LocalStore(self.path, read_only=True), self._count)
        opened = zarr.open(store=store, mode="r")
        arrays, axes = ([opened], None) if isinstance(opened, zarr.Array) else _levels_of(opened, zarr)
        return tuple(_level(array, axes) for array in arrays)

    def _describe(self, source: tuple[_Level, ...]) -> Layout:
        for level in source:
            eight_bits(np.zeros(0, level.array.dtype))
        sizes = tuple(size_in(level.layout, level.shape) for level in source)
        return Layout(sizes, channels_in(source[0].layout, source[0].shape))

    def _tile_size(self, level: int) -> tuple[int, int]:
        array, where, layout, _ = self._source()[level]
        chunks = [side for side, index in zip(array.chunks, where, strict=True) if isinstance(index, slice)]
        return size_in(layout, tuple(chunks))

    def _decode(self, tile: Tile, box: Box) -> Pixels:
        array, where, layout, _ = self._source()[tile.level]
        inside = iter(cut(layout, box))
        values = array[tuple(next(inside) if isinstance(index, slice) else index for index in where)]
        return without_alpha(eight_bits(channels_last(layout, np.asarray(values))))


def _levels_of(group: Any, zarr: Any) -> tuple[list[Any], str | None]:
    """The arrays of a group, finest first, and their axes where they are named."""
    attributes = dict(group.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if scales:
        names = [axis if isinstance(axis, str) else axis["name"] for axis in scales[0].get("axes", [])]
        arrays = [group[dataset["path"]] for dataset in scales[0]["datasets"]]
        return arrays, "".join(names) or None
    arrays = [member for _, member in group.members() if isinstance(member, zarr.Array)]
    if not arrays:
        raise ValueError("a group without arrays")
    return sorted(arrays, key=lambda array: -int(np.prod(array.shape))), None


def _level(array: Any, axes: str | None) -> _Level:
    if axes is None:
        return _Level(array, (slice(None),) * array.ndim, layout_of(array.shape), array.shape)
    if len(axes) != array.ndim:
        raise ValueError(f"axes {axes!r} of an array {list(array.shape)}")
    kept = [axis in "xy" or (axis == "c" and side > 1) for axis, side in zip(axes, array.shape, strict=True)]
    stacked = [side for side, keep in zip(array.shape, kept, strict=True) if not keep]
    layout = "".join("s" if axis == "c" else axis for axis, keep in zip(axes, kept, strict=True) if keep)
    shape = tuple(side for side, keep in zip(array.shape, kept, strict=True) if keep)
    if any(side != 1 for side in stacked) or layout not in ("yx", "yxs", "syx") or not _few_channels(layout, shape):
        raise ValueError(f"an array {list(array.shape)} with axes {axes!r} is not one image of 1 to 4 channels")
    return _Level(array, tuple(slice(None) if keep else 0 for keep in kept), layout, shape)


def _few_channels(layout: str, shape: Sequence[int]) -> bool:
    return "s" not in layout or shape[layout.index("s")] <= 4


def _counting(store: Any, count: Any) -> Any:
    """The store, telling how many bytes of chunks it gave."""
    wrapper = require("zarr.storage", "zoom").WrapperStore

    class Counting(wrapper):  # type: ignore[misc, valid-type]
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await self._store.get(key, prototype, byte_range)
            if value is not None and not _ABOUT.search(key):
                count(len(value))
            return value

    return Counting(store)
