"""What every reader of a large image offers, and the part that does not depend on the file's format."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from torch import Tensor

from scrimp.data.decode import ImageError
from scrimp.data.large_cache import SHARED, PixelCache, Pixels
from scrimp.data.large_pixels import Box, shrink, to_tensor
from scrimp.primitives.errors import InputError, MissingExtraError


class LargeImage(Protocol):
    """An image that need not fit into memory. `scrimp.data.open_image` gives one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    @property
    def levels(self) -> Sequence[tuple[int, int]]:
        """Width and height of each resolution stored, finest first; the first is ``size``."""

    @property
    def channels(self) -> int:
        """3 (RGB) or 1 (grey)."""

    @property
    def bytes_read(self) -> int | None:
        """Bytes of pixels, as stored (compressed), that this process read for this image; ``None`` if unknown."""

    def thumbnail(self, size: int | tuple[int, int]) -> Tensor:
        """The whole image, smaller: uint8 [C, h, w]."""

    def read(self, box: Sequence[int], level: int = 0) -> Tensor:
        """A part of it, uint8 [C, h, w]; ``box`` in pixels of level 0."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Layout(NamedTuple):
    """What the head of a file says."""

    levels: tuple[tuple[int, int], ...]
    channels: int


def damaged(path: str, reason: object) -> ImageError:
    """The one-line error of a file that cannot be read."""
    said = " ".join(str(reason).split()) or type(reason).__name__
    return ImageError("a readable image", f"{path!r} ({said})", "replace or remove it")


class _Here:
    """What belongs to one process: a forked child must neither share a file's position nor wait for a dead lock."""

    def __init__(self) -> None:
        self.pid, self.lock = os.getpid(), Lock()
        self.source: Any = None
        self.bytes_read = 0


class Reader(ABC):
    """A large image in a file. Opened on first use in every process, also after pickling or a fork.

    Threads may share one. Pixels are 8-bit, opacity laid on white.

    Args:
        path: the file.
        cache: where decoded pixels are kept; all images share `scrimp.data.large_cache.SHARED` when not given.

    Raises:
        ImageError: the file is missing, damaged, or of a kind that this reader does not know.
        MissingExtraError: the package that reads this kind is not installed.
    """

    counts_bytes = True

    def __init__(self, path: str | os.PathLike[str], *, cache: PixelCache | None = None) -> None:
        self.path = os.fspath(path)
        self._own_cache = cache
        self._closed = False
        self._here = _Here()
        with self._blaming_file():
            state = os.stat(self.path)
            self._identity = (str(Path(self.path).absolute()), state.st_mtime_ns, state.st_size)
            self._layout = self._describe(self._source())

    @property
    def size(self) -> tuple[int, int]:
        return self._layout.levels[0]

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        return self._layout.levels

    @property
    def channels(self) -> int:
        return self._layout.channels

    @property
    def bytes_read(self) -> int | None:
        return self._local().bytes_read if self.counts_bytes else None

    @property
    def cache(self) -> PixelCache:
        return SHARED if self._own_cache is None else self._own_cache

    def read(self, box: Sequence[int], level: int = 0) -> Tensor:
        """A part of the image.

        Args:
            box: left, top, width, height in pixels of level 0, whatever the level. It may reach beyond the image.
            level: which of ``levels``. There, with fx and fy the ratios of the widths and of the heights of level 0
                and of this one, the part starts at pixel (round(left / fx), round(top / fy)).

        Returns:
            uint8 [C, max(1, round(height / fy)), max(1, round(width / fx))], halves rounded up: the shape depends on
            the box's size only. Outside the image it is 0.

        Raises:
            InputError: no such level, no area, or not whole numbers.
            ImageError: the file is damaged where the part lies.
        """
        left, top, width, height = self._at_level(_checked_box(box), self._checked_level(level))
        canvas = np.zeros((height, width, self.channels), np.uint8)
        full_width, full_height = self.levels[level]
        x0, x1 = max(left, 0), min(left + width, full_width)
        y0, y1 = max(top, 0), min(top + height, full_height)
        if x0 < x1 and y0 < y1:
            with self._blaming_file():
                canvas[y0 - top : y1 - top, x0 - left : x1 - left] = self._region((x0, y0, x1 - x0, y1 - y0), level)
        return to_tensor(canvas)

    def thumbnail(self, size: int | tuple[int, int]) -> Tensor:
        """The whole image, smaller, antialiased, from the coarsest level that is no smaller than that.

        Args:
            size: (width, height) to fit into, the ratio of the sides kept, as PIL's and OpenSlide's thumbnails; a
                number is the longer side. Never enlarged.

        Returns:
            uint8 [C, h, w], as `thumbnail_size` says.

        Raises:
            InputError: the size is less than one pixel.
            ImageError: the file is damaged.
        """
        to = thumbnail_size(self.size, size)
        level = max(i for i, (w, h) in enumerate(self.levels) if i == 0 or (w >= to[0] and h >= to[1]))
        with self._blaming_file():
            return self._shrunk(to, level)

    def close(self) -> None:
        """Let go of the file. Reading afterwards raises InputError."""
        self._closed = True
        here = self._local()
        with here.lock:
            if hasattr(here.source, "close"):
                here.source.close()
            here.source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, size={self.size}, levels={len(self.levels)})"

    @abstractmethod
    def _open(self) -> Any:
        """The file, opened in this process."""

    @abstractmethod
    def _describe(self, source: Any) -> Layout:
        """What its head says; called once, when the image is first opened."""

    @abstractmethod
    def _region(self, box: Box, level: int) -> Pixels:
        """Pixels [h, w, C] of ``box``, in this level's own pixels and wholly inside it. May be a view."""

    @abstractmethod
    def _blocks(self, level: int) -> Iterator[tuple[Box, Pixels]]:
        """The whole level in pieces, each read once, none kept."""

    def _shrunk(self, to: tuple[int, int], level: int) -> Tensor:
        return to_tensor(shrink(self._blocks(level), self.levels[level], to, self.channels))

    def _local(self) -> _Here:
        if self._here is None or self._here.pid != os.getpid():
            self._here = _Here()
        return self._here

    def _source(self) -> Any:
        if self._closed:
            raise InputError("an open image", f"{self.path!r}, which was closed", "open it again")
        here = self._local()
        with here.lock:
            if here.source is None:
                here.source = self._open()
            return here.source

    def _count(self, number: int) -> None:
        here = self._local()
        with here.lock:
            here.bytes_read += number

    def _blaming_file(self) -> _Blame:
        return _Blame(self.path)

    def _checked_level(self, level: int) -> int:
        if level not in range(len(self.levels)):
            raise InputError(f"a level from 0 to {len(self.levels) - 1}", f"level {level!r}", "see the image's levels")
        return level

    def _at_level(self, box: Box, level: int) -> Box:
        scale = [(own, full) for own, full in zip(self.levels[level], self.size, strict=True)]
        left, top, width, height = (_scaled(value, *scale[axis % 2]) for axis, value in enumerate(box))
        return left, top, max(1, width), max(1, height)


class _Blame:
    """Whatever a decoder raises inside becomes one line about the file: every codec has its own errors."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, (InputError, MissingExtraError, MemoryError)):
            return
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise damaged(self.path, reason) from error


def thumbnail_size(size: tuple[int, int], within: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image of ``size`` made to fit into ``within``; a number is the longer side.

    Raises:
        InputError: ``within`` is less than one pixel.
    """
    width, height = (within, within) if isinstance(within, int) else within
    if min(width, height) < 1:
        raise InputError("a thumbnail of at least 1 pixel", str(within), "pass the longer side or (width, height)")
    scale = min(width / size[0], height / size[1], 1.0)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def _scaled(value: int, own: int, full: int) -> int:
    """value * own / full, halves up, in whole numbers: exact at any size."""
    return (2 * value * own + full) // (2 * full)


def _checked_box(box: Sequence[int]) -> Box:
    try:
        left, top, width, height = (operator.index(value) for value in box)
    except (TypeError, ValueError):
        remedy = "pass left, top, width, height in pixels"
        raise InputError("a box of four whole numbers", repr(box), remedy) from None
    if min(width, height) < 1:
        raise InputError("a box of at least 1 x 1 pixels", f"{width} x {height}", "give it a width and a height")
    return left, top, width, height
