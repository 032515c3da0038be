"""A large image kept as what is on it: patches on black. Read like one from a file, its pixels never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from scrimp.data.large_image import thumbnail_size
from scrimp.data.large_pixels import shrink, to_tensor
from scrimp.primitives.errors import InputError
from zoom_items import Box


@dataclass(frozen=True, eq=False)
class SparseImage:
    """Grey patches that do not overlap, and their image, as `scrimp.data.open_image` gives those of files.

    Attributes:
        size: width and height in pixels.
        patches, corners: uint8 [items, side, side], and their left and top, int64 [items, 2].
        bytes_read: from disk; there is none.
    """

    size: tuple[int, int]
    patches: np.ndarray
    corners: np.ndarray
    label: int
    boxes: tuple[Box, ...]
    bytes_read: int = 0
    channels: int = 1

    @property
    def levels(self) -> tuple[tuple[int, int]]:
        return (self.size,)

    def canvas(self) -> np.ndarray:
        """uint8 [height, width]."""
        pixels = np.zeros(self.size[::-1], np.uint8)
        for patch, (left, top) in zip(self.patches, self.corners, strict=True):
            pixels[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        return pixels

    def read(self, box: Sequence[int], level: int = 0) -> Tensor:
        """Pixels uint8 [1, height, width] of ``box``: left, top, width and height; zeros outside the image.

        Raises:
            InputError: no area, or a level other than 0.
        """
        left, top, width, height = box
        if width < 1 or height < 1:
            raise InputError("a box of one pixel or more", f"{width} x {height}", "pass left, top, width and height")
        if level != 0:
            raise InputError("level 0, the only one", str(level), "take the thumbnail")
        found = np.zeros((height, width), np.uint8)
        side = self.patches.shape[1]
        near = (self.corners < (left + width, top + height)) & (self.corners + side > (left, top))
        for item in np.flatnonzero(near.all(1)):
            across, down = self.corners[item] - (left, top)
            part = self.patches[item][max(-down, 0) : height - down, max(-across, 0) : width - across]
            found[max(down, 0) : down + side, max(across, 0) : across + side] = part
        return torch.from_numpy(found)[None]

    def thumbnail(self, size: int | tuple[int, int]) -> Tensor:
        """The whole image made to fit into ``size``, never enlarged: uint8 [1, h, w], bit for bit as from a .npy file.

        Reduction is linear and black adds nothing, so the patches alone are handed to it.

        Raises:
            InputError: the size is less than one pixel.
        """
        side = self.patches.shape[1]
        blocks = (
            ((left, top, side, side), patch[..., None])
            for (left, top), patch in zip(self.corners.tolist(), self.patches, strict=True)
        )
        return to_tensor(shrink(blocks, self.size, thumbnail_size(self.size, size), self.channels))

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> SparseImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
