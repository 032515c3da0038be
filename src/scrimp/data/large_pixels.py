"""What the readers of large images do to pixels: one meaning of bits, channels and transparency, and reduction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scrimp.data.large_cache import Pixels

Raw = npt.NDArray[Any]
Box = tuple[int, int, int, int]
"""Left, top, width, height."""

_ORDERS = {"yx": (0, 1), "yxs": (0, 1, 2), "syx": (1, 2, 0)}


def eight_bits(values: Raw, bits: int | None = None) -> Pixels:
    """Whole numbers as uint8, the full range scaled, never clipped: 16 bits as round(value / 257).

    Args:
        values: bool, uint8 or uint16.
        bits: how many bits of them are used, such as 12; all of them when not given.

    Raises:
        ValueError: another type: its pixels have no agreed range.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise ValueError(f"{values.dtype} pixels have no agreed range; convert them to 8 or 16 bits without sign")
    bits = bits or 8 * values.dtype.itemsize
    if bits == 8:
        return values.astype(np.uint8, copy=False)
    top = 2**bits - 1
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def without_alpha(values: Pixels, *, premultiplied: bool = False) -> Pixels:
    """Grey or RGB [h, w, 1 | 3] of what has 1 to 4 channels: the 2nd of two and 4th of four is opacity, laid on white
    as `scrimp.data.decode.decode_image` does."""
    channels = values.shape[2]
    if channels in (1, 3):
        return values
    colour = values[..., :-1].astype(np.uint32)
    opacity = values[..., -1:].astype(np.uint32)
    lit = colour * 255 if premultiplied else colour * opacity
    return np.minimum((lit + (255 - opacity) * 255 + 127) // 255, 255).astype(np.uint8)


def layout_of(shape: tuple[int, ...]) -> str:
    """Axes of an array that does not name them: ``yx``, ``yxs`` (1 to 4 channels last) or ``syx`` (channels first).

    Where both would do, channels are last.

    Raises:
        ValueError: neither is possible, or there are no pixels.
    """
    if 0 in shape:
        raise ValueError(f"no pixels in an array {list(shape)}")
    if len(shape) == 2:
        return "yx"
    if len(shape) == 3 and 1 <= shape[2] <= 4:
        return "yxs"
    if len(shape) == 3 and 1 <= shape[0] <= 4:
        return "syx"
    raise ValueError(f"an array {list(shape)}, not [h, w], [h, w, c] or [c, h, w] with c from 1 to 4")


def size_in(layout: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height."""
    return shape[layout.index("x")], shape[layout.index("y")]


def channels_in(layout: str, shape: tuple[int, ...]) -> int:
    """1 or 3: the channels that remain when opacity is gone."""
    return 3 if "s" in layout and shape[layout.index("s")] >= 3 else 1


def cut(layout: str, box: Box) -> tuple[slice, ...]:
    """The index that takes ``box`` out of an array of that layout."""
    left, top, width, height = box
    sides = {"x": slice(left, left + width), "y": slice(top, top + height), "s": slice(None)}
    return tuple(sides[axis] for axis in layout)


def channels_last(layout: str, values: Raw) -> Raw:
    """[h, w, c] of an array in that layout."""
    turned = values.transpose(_ORDERS[layout])
    return turned[..., None] if turned.ndim == 2 else turned


def to_tensor(pixels: Pixels) -> Tensor:
    """A uint8 tensor [C, h, w] of its own."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def shrink(blocks: Iterable[tuple[Box, Pixels]], size: tuple[int, int], to: tuple[int, int], channels: int) -> Pixels:
    """An antialiased smaller view of an image that comes in pieces; the whole is never held.

    Whole factors are averaged away first, down to no less than twice ``to``; PIL's bilinear resizing does the rest,
    on the exact extent, so that the view covers the image to its last row and column.

    Args:
        blocks: boxes that cover the image once, with their pixels.
        size: width and height of the image.
        to: width and height asked for, no larger than ``size``.
        channels: 1 or 3.

    Returns:
        uint8 [height, width, channels].
    """
    from PIL import Image

    steps = [max(1, full // (2 * wanted)) for full, wanted in zip(size, to, strict=True)]
    cells = [-(-full // step) for full, step in zip(size, steps, strict=True)]
    sums = np.zeros((cells[1], cells[0], channels), np.uint32)
    for (left, top, width, height), pixels in blocks:
        columns, rows = _cells(left, width, steps[0]), _cells(top, height, steps[1])
        part = np.add.reduceat(pixels, rows[1], axis=0, dtype=np.uint32)
        sums[rows[0], columns[0]] += np.add.reduceat(part, columns[1], axis=1)
    counts = np.outer(*(_counts(size[axis], steps[axis]) for axis in (1, 0)))[..., None]
    small = ((sums + counts // 2) // counts).astype(np.uint8)
    picture = Image.fromarray(small[..., 0] if channels == 1 else small)
    extent = (0.0, 0.0, size[0] / steps[0], size[1] / steps[1])
    values = np.asarray(picture.resize(to, Image.Resampling.BILINEAR, box=extent))
    return values[..., None] if channels == 1 else values


def _cells(start: int, length: int, step: int) -> tuple[slice, npt.NDArray[np.intp]]:
    """Which cells of ``step`` pixels the run touches, and where in the run each begins."""
    first, last = start // step, (start + length - 1) // step
    begins = np.arange(first, last + 1) * step - start
    return slice(first, last + 1), np.maximum(begins, 0)


def _counts(length: int, step: int) -> npt.NDArray[np.uint32]:
    """Pixels in each cell; fewer in the last."""
    begins = np.arange(0, length, step)
    return (np.minimum(begins + step, length) - begins).astype(np.uint32)
