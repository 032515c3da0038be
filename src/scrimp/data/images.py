"""Sets of labelled images: whole in memory, or decoded when asked for. Both give uint8 batches [n, C, H, W]."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self

import torch
from torch import Tensor

from scrimp.data.decode import ImageError, decode_image
from scrimp.primitives.errors import InputError

Progress = Callable[[int, int], None]
"""Called with how many images are done and how many there are."""

_CHUNK = 64  # images a thread takes at a time


class Images(Protocol):
    """What training needs of a set of N labelled images; map-style, so that torch's DataLoader takes it.

    Give the DataLoader ``collate_fn=lambda batch: batch`` (a named function where workers are spawned): the whole
    batch is asked for at once through ``__getitems__`` and arrives as it is.
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 [n], from 0 on, on the CPU) as uint8 [n, C, H, W]."""

    def take(self, indices: Tensor) -> Self:
        """The same kind of set with only the images at ``indices`` (int64 [n]), in that order."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, uint8 [C, H, W], and its label."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [n, C, H, W], labels int64 [n] and the indices themselves, int64 [n]."""


class _Indexed(ABC):
    """The part of `Images` that follows from ``labels`` and ``batch``."""

    labels: Tensor

    @abstractmethod
    def batch(self, indices: Tensor) -> Tensor: ...

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = torch.tensor([index % len(self)])
        return self.batch(row)[0], int(self.labels[row])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.batch(rows), self.labels[rows], rows


class TensorImages(_Indexed):
    """A whole set in memory.

    Args:
        pixels: uint8 [N, C, H, W]; kept, not copied.
        labels: int64 [N].

    Raises:
        InputError: another type or shape, or another number of labels than images.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            got = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
            raise InputError("images as uint8 [N, C, H, W]", got, "convert them first")
        self.pixels = pixels
        self.labels = _checked_labels(labels, len(pixels))

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def batch(self, indices: Tensor) -> Tensor:
        return self.pixels.index_select(0, indices)  # an order of magnitude faster than pixels[indices]

    def take(self, indices: Tensor) -> TensorImages:
        return TensorImages(self.pixels[indices], self.labels[indices])


class OnDemandImages(_Indexed):
    """A set whose images are decoded each time they are asked for.

    Args:
        labels: int64 [N].
        shape: channels (3: RGB, 1: grey), height and width that every image is brought to.
    """

    threads = 1  # how many may call `read` at once when the set is read whole

    def __init__(self, labels: Tensor, shape: tuple[int, int, int]) -> None:
        self.labels = _checked_labels(labels, len(labels))
        self.shape = shape

    @property
    def mode(self) -> str:
        """PIL's name for the channels: ``"RGB"`` or ``"L"``."""
        return "L" if self.shape[0] == 1 else "RGB"

    @abstractmethod
    def read(self, row: int) -> Tensor:
        """One image, uint8 [C, H, W].

        Raises:
            ImageError: it cannot be decoded.
        """

    @abstractmethod
    def name_of(self, row: int) -> str:
        """What a message calls the image."""

    @abstractmethod
    def take(self, indices: Tensor) -> OnDemandImages: ...

    def batch(self, indices: Tensor) -> Tensor:
        pixels = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for place, row in enumerate(indices.tolist()):
            pixels[place] = self.read(row)
        return pixels


class FileImages(OnDemandImages):
    """Image files, decoded by PIL as `scrimp.data.decode.decode_image` says.

    Args:
        paths: N files.
        labels: int64 [N].
        size: side of the square in pixels, or (height, width).
        mode: ``"RGB"`` or ``"L"``.

    Raises:
        InputError: another mode, or another number of labels than paths. Reading raises `ImageError`, an
            InputError that names the file, also out of a DataLoader's worker.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        labels: Tensor,
        *,
        size: int | tuple[int, int],
        mode: str = "RGB",
    ) -> None:
        if mode not in ("RGB", "L"):
            raise InputError("mode 'RGB' or 'L'", repr(mode), "choose one of them")
        self.paths = tuple(os.fspath(path) for path in paths)
        super().__init__(_checked_labels(labels, len(self.paths)), (1 if mode == "L" else 3, *pair_of(size)))
        self.threads = processors()

    def read(self, row: int) -> Tensor:
        return decode_image(self.paths[row], size=self.shape[1:], mode=self.mode)

    def name_of(self, row: int) -> str:
        return self.paths[row]

    def take(self, indices: Tensor) -> FileImages:
        paths = [self.paths[row] for row in indices.tolist()]
        return FileImages(paths, self.labels[indices], size=self.shape[1:], mode=self.mode)


def read_all(
    images: OnDemandImages, *, keep: bool = True, skip: bool = False, progress: Progress | None = None
) -> tuple[Tensor | None, list[int]]:
    """Decode a whole set once, in as many threads as it allows.

    Args:
        keep: keep the pixels; else the images are only tried.
        skip: list what cannot be decoded instead of raising.
        progress: see `Progress`.

    Returns:
        The pixels, uint8 [N, C, H, W] (rows that failed are undefined) or ``None``, and the rows that failed.

    Raises:
        ImageError: an image cannot be decoded, and ``skip`` is false.
    """
    count = len(images)
    pixels = torch.empty((count, *images.shape), dtype=torch.uint8) if keep else None

    def read(start: int) -> list[int]:
        failed = []
        for row in range(start, min(start + _CHUNK, count)):
            try:
                image = images.read(row)
            except ImageError:
                if not skip:
                    raise
                failed.append(row)
            else:
                if pixels is not None:
                    pixels[row] = image
        return failed

    broken: list[int] = []
    with ThreadPoolExecutor(images.threads) as pool:
        try:
            for start, failed in zip(range(0, count, _CHUNK), pool.map(read, range(0, count, _CHUNK)), strict=True):
                broken += failed
                if progress is not None:
                    progress(min(start + _CHUNK, count), count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pixels, broken


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pair_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width from a side or from both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError("a size of at least 1 pixel", str(size), "pass a side or (height, width)")
    return height, width


def _checked_labels(labels: Tensor, count: int) -> Tensor:
    if labels.ndim != 1 or len(labels) != count or labels.is_floating_point():
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise InputError(f"labels as int64 [{count}]", got, "give each image one class number")
    return labels.to(torch.int64)
