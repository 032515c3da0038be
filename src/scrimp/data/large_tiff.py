"""TIFF and BigTIFF, in tiles or strips, with or without a pyramid, read through tifffile: only what is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scrimp.data.large_cache import Pixels
from scrimp.data.large_image import Layout
from scrimp.data.large_pixels import Box, Raw, channels_last, eight_bits, without_alpha
from scrimp.data.large_tiles import Tile, TiledReader
from scrimp.primitives.errors import require

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEG = 7
_UNCOMPRESSED = 1
_PREMULTIPLIED, _STRAIGHT = 1, 2  # what an extra sample may be; anything else is no opacity and dropped
_ROWS_BYTES = 2**18  # what is read at once of a file that is one long strip


class _Level(NamedTuple):
    """One resolution: where its segments lie and how one is decoded."""

    size: tuple[int, int]
    segment: tuple[int, int]  # width, height
    offsets: npt.NDArray[np.int64]  # [planes, segments]
    counts: npt.NDArray[np.int64]
    decode: Callable[[int, int, bytes], Raw]  # plane, segment, bytes -> [h, w, samples], perhaps padded
    finish: Callable[[Raw], Pixels]  # all samples [h, w, s] -> uint8 [h, w, 1 | 3]
    channels: int


class TiffImage(TiledReader):
    """The first image of a TIFF file and its pyramid (levels, SubIFDs or reduced pages, as tifffile finds them).

    8, 16 and fewer bits without sign; grey, RGB, palette, and YCbCr inside JPEG; one plane of samples or several.
    16 bits are scaled to 8. Tags, such as the tables of tiles, are not in ``bytes_read``.
    """

    def _open(self) -> tuple[_Level, ...]:
        # The file is not kept open: a data set of large images would run out of file descriptors.
        with require("tifffile", "zoom").TiffFile(self.path) as file:
            levels = tuple(_level(level) for level in file.series[0].levels)
            length = file.filehandle.size
        end = max(int((level.offsets + level.counts).max()) for level in levels)
        if end > length:
            raise ValueError(f"truncated: {length} of at least {end} bytes")
        return levels

    def _describe(self, source: tuple[_Level, ...]) -> Layout:
        return Layout(tuple(level.size for level in source), source[0].channels)

    def _tile_size(self, level: int) -> tuple[int, int]:
        segment: tuple[int, int] = self._source()[level].segment
        return segment

    def _decode(self, tile: Tile, box: Box) -> Pixels:
        level: _Level = self._source()[tile.level]
        across = -(-level.size[0] // level.segment[0])
        segment = tile.row * across + tile.column
        planes = [self._plane(level, plane, segment, box) for plane in range(len(level.offsets))]
        return level.finish(np.concatenate(planes, axis=2))

    def _plane(self, level: _Level, plane: int, segment: int, box: Box) -> Raw:
        offset, count = int(level.offsets[plane, segment]), int(level.counts[plane, segment])
        data = self._bytes(offset, count)
        return level.decode(plane, segment, data)[: box[3], : box[2]]

    def _bytes(self, offset: int, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(count)
        if len(data) != count:
            raise ValueError(f"truncated: {len(data)} of {count} bytes at {offset}")
        self._count(count)
        return data


def _level(level: Any) -> _Level:
    """A level of tifffile's series."""
    page = level.keyframe
    sides = {axis.lower(): side for axis, side in zip(level.axes, level.shape, strict=True) if side > 1}
    one_page = (sides.pop("x", 1), sides.pop("y", 1)) == (page.imagewidth, page.imagelength)
    if not one_page or not (sides.keys() <= {"s"} or sides.keys() <= {"c"}):
        raise ValueError(f"a stack of images, axes {level.axes} {list(level.shape)}; save each on its own")
    pages = [level.pages[i] for i in range(len(level.pages))]
    samples = len(pages) * page.samplesperpixel
    planes = _by_plane(pages, page)
    colours, finish = _colours(page, samples)
    size = page.imagewidth, page.imagelength
    if _is_one_strip(page, planes):
        return _in_rows(page, planes, size)._replace(finish=finish, channels=colours)
    segment = (page.tilewidth, page.tilelength) if page.is_tiled else (size[0], min(page.rowsperstrip, size[1]))
    _check_tables(planes, size, segment)
    return _Level(size, segment, planes[0], planes[1], _decoder(pages, planes[0].shape), finish, colours)


_Planes = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _by_plane(pages: Sequence[Any], page: Any) -> _Planes:
    """Offsets and byte counts, [planes, segments]: a plane is a page, or a sample of a page stored by samples."""
    if any(one is None for one in pages):
        raise ValueError("a page of it is not in the file")
    planes = len(pages) * (page.samplesperpixel if page.planarconfig == 2 else 1)
    offsets, counts = (
        np.array([getattr(one, name) for one in pages], np.int64).reshape(planes, -1)
        for name in ("dataoffsets", "databytecounts")
    )
    return offsets, counts


def _check_tables(planes: _Planes, size: tuple[int, int], segment: tuple[int, int]) -> None:
    wanted = -(-size[0] // segment[0]) * -(-size[1] // segment[1])
    if not planes[0].shape[1] == planes[1].shape[1] == wanted:
        raise ValueError(f"{planes[0].shape[1]} tiles or strips listed where {wanted} were to be")


def _decoder(pages: Sequence[Any], shape: tuple[int, ...]) -> Callable[[int, int, bytes], Raw]:
    """tifffile's decoding of one segment."""
    page = pages[0].keyframe
    samples = 1 if page.planarconfig == 2 else page.samplesperpixel
    per_page = shape[0] // len(pages)
    decoder = page.decode  # asked for while the file is open, as are the tables
    tables = [{"jpegtables": one.jpegtables, "jpegheader": one.jpegheader} for one in pages]

    def decode(plane: int, segment: int, data: bytes) -> Raw:
        index = plane % per_page * shape[1] + segment
        # An empty segment is one that was left out because it holds nothing but the background.
        values, _, full = decoder(data or None, index, **tables[plane // per_page])
        return np.zeros((*full[1:3], samples), page.dtype) if values is None else values[0]

    return decode


def _is_one_strip(page: Any, planes: _Planes) -> bool:
    """Uncompressed whole in one piece: any rows of it can be read alone."""
    plain = page.compression == _UNCOMPRESSED and page.predictor == 1 and page.fillorder == 1
    return bool(plain and not page.is_tiled and planes[0].shape[1] == 1 and page.bitspersample in (8, 16))


def _in_rows(page: Any, planes: _Planes, size: tuple[int, int]) -> _Level:
    """A level that is one long strip, seen as many short ones."""
    width, height = size
    samples = 1 if page.planarconfig == 2 else page.samplesperpixel
    dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    row_bytes = width * samples * dtype.itemsize
    if int(planes[1].min()) < row_bytes * height:
        raise ValueError(f"{int(planes[1].min())} bytes of pixels where {row_bytes * height} were to be")
    rows = min(height, max(1, _ROWS_BYTES // row_bytes))
    starts = np.arange(0, height, rows)
    counts = (np.minimum(starts + rows, height) - starts) * row_bytes

    def decode(plane: int, segment: int, data: bytes) -> Raw:
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(-1, width, samples)

    offsets = planes[0] + starts * row_bytes
    return _Level(size, (width, rows), offsets, np.broadcast_to(counts, offsets.shape), decode, eight_bits, 1)


def _colours(page: Any, samples: int) -> tuple[int, Callable[[Raw], Pixels]]:
    """Channels that come out, and what makes them of the stored samples.

    Raises:
        ValueError: the meaning of the samples is not one that this reader knows.
    """
    kind, bits = int(page.photometric), page.bitspersample
    eight_bits(np.zeros(0, page.dtype), bits)  # says now what it would say of every tile
    if kind == _PALETTE and samples == 1:
        table = eight_bits(channels_last("syx", page.colormap[:, None])[0])
        return 3, lambda values: table[values[..., 0]]
    if kind == _BLACK_IS_ZERO and samples == 3:
        return 3, lambda values: eight_bits(values, bits)  # each colour a page of its own
    colours = 3 if kind == _RGB or (kind == _YCBCR and page.compression == _JPEG) else 1
    known = colours == 3 or kind in (_BLACK_IS_ZERO, _WHITE_IS_ZERO)
    if not known or samples not in (colours, colours + 1):
        raise ValueError(f"{samples} samples a pixel of kind {page.photometric!s}; convert it to grey or RGB")
    extra = int(page.extrasamples[0]) if page.extrasamples else 0

    def finish(values: Raw) -> Pixels:
        pixels = eight_bits(values, bits)
        if kind == _WHITE_IS_ZERO:
            pixels = np.concatenate([255 - pixels[..., :1], pixels[..., 1:]], axis=2)
        if extra not in (_PREMULTIPLIED, _STRAIGHT):
            return pixels[..., :colours]
        return without_alpha(pixels, premultiplied=extra == _PREMULTIPLIED)

    return colours, finish
