"""Views and patches of many large images: few of them open at a time, views kept between runs, bytes counted."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scrimp.data.open_image import LargeImage, open_image
from scrimp.jobs.zoom_files import Gallery
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

KEPT_VIEW = 2**20
"""Bytes up to which a view is kept; larger ones are made anew each time."""

Shape = tuple[int, int, int]
"""Channels, height, width."""


class Readers:
    """The images of a gallery, opened when they are asked for, the least recently used closed first.

    Args:
        gallery: the images.
        limit: how many files are open at a time.

    Attributes:
        bytes_read: bytes of pixels as stored that were read in this process, ``None`` once a reader does not know.
    """

    def __init__(self, gallery: Gallery, *, limit: int) -> None:
        self.gallery, self.limit = gallery, limit
        self.bytes_read: int | None = 0
        self._open: OrderedDict[int, LargeImage] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def open(self, row: int) -> LargeImage:
        """The image of a row.

        Raises:
            ImageError: it is missing or damaged.
        """
        image = self.gallery.images[row]
        if not isinstance(image, str):
            return image
        if row not in self._open:
            self._open[row] = open_image(image)
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(row)
        return self._open[row]

    def view(self, row: int, shape: Shape) -> Tensor:
        """The whole image brought to exactly this shape, uint8; antialiased."""
        image, (channels, height, width) = self.open(row), shape
        with self._counting(image):
            scale = max(width / image.size[0], height / image.size[1])
            within = tuple(math.ceil(side * scale) for side in image.size) if scale < 1 else image.size
            small = image.thumbnail((within[0], within[1]))
        return of_channels(resized(small[None], height, width)[0], channels)

    def patches(self, row: int, boxes: Tensor, side: int, channels: int) -> Tensor:
        """Parts of an image at full resolution, uint8 [n, channels, side, side]; zeros outside the image.

        Args:
            boxes: int64 [n, 4]: left, top, width and height in pixels of the full image. Boxes larger than ``side``
                are reduced to it, from the coarsest level stored that is no coarser.
        """
        image = self.open(row)
        found = torch.empty((len(boxes), channels, side, side), dtype=torch.uint8)
        with self._counting(image):
            for place, box in enumerate(boxes.tolist()):
                part = image.read(box, _level(image, max(box[2], box[3]) / side))
                found[place] = of_channels(resized(part[None], side, side)[0], channels)
        return found

    @contextlib.contextmanager
    def _counting(self, image: LargeImage) -> Iterator[None]:
        before = image.bytes_read
        yield
        after = image.bytes_read
        if before is None or after is None or self.bytes_read is None:
            self.bytes_read = None
        else:
            self.bytes_read += after - before


class Views:
    """Views of one shape, made once: in a folder where they come from files, else in memory.

    Args:
        readers: of the images.
        shape: of every view.
        folder: where to keep them; nowhere if omitted.
    """

    def __init__(self, readers: Readers, shape: Shape, folder: Path | None) -> None:
        self.readers, self.shape = readers, shape
        self.keeps = math.prod(shape) <= KEPT_VIEW
        self.folder = folder if self.keeps else None
        self._memory: dict[int, Tensor] = {}

    def get(self, row: int) -> Tensor:
        """uint8 of this shape.

        Raises:
            ImageError: the image is missing or damaged.
        """
        image = self.readers.gallery.images[row]
        if not isinstance(image, str):
            return self._in_memory(row)
        if self.folder is None:
            return self.readers.view(row, self.shape)
        path = self._path(row, image)
        kept = _load(path, self.shape)
        if kept is not None:
            return kept
        view = self.readers.view(row, self.shape)
        content = view.numpy().tobytes()
        try:
            write_atomic(path, content + struct.pack("<I", zlib.crc32(content)))
        except OSError as error:
            raise InputError(
                "a --cache folder with room", f"{self.folder} ({error.strerror})", "pass another"
            ) from error
        return view

    def _in_memory(self, row: int) -> Tensor:
        if row not in self._memory:
            view = self.readers.view(row, self.shape)
            if not self.keeps:
                return view
            self._memory[row] = view
        return self._memory[row]

    def _path(self, row: int, image: str) -> Path:
        """Named after what the view is made of: another file of that name is another view."""
        assert self.folder is not None
        try:
            state = os.stat(image)
        except OSError:
            self.readers.open(row)  # says in one line what is wrong with it
            raise
        said = f"{os.path.abspath(image)}\n{state.st_mtime_ns}\n{state.st_size}\n{self.shape}"
        name = hashlib.sha256(said.encode()).hexdigest()
        return self.folder / name[:2] / name[2:34]


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [n, C, h, w] brought to a size, bilinear and antialiased; as they are where they have it."""
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)


def of_channels(image: Tensor, channels: int) -> Tensor:
    """uint8 [C, h, w] as grey (by ITU-R 601 luma, as PIL does) or RGB."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    red, green, blue = image.to(torch.int32).unbind(0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[None]


def _level(image: LargeImage, reduction: float) -> int:
    """The coarsest level that keeps what remains after this reduction."""
    fits = [place for place, size in enumerate(image.levels) if image.size[0] / size[0] <= reduction * (1 + 1e-6)]
    return max(fits, default=0)


def _load(path: Path, shape: Shape) -> Tensor | None:
    """A view kept before; ``None`` if there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) != math.prod(shape) + 4 or zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        return None
    return torch.from_numpy(np.frombuffer(content, np.uint8, math.prod(shape)).copy()).view(shape)
