"""Pixels of any depth that PIL reads, as 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def eight_bits(picture: Picture) -> Picture:
    """The picture itself, or its 16-bit pixels scaled: PIL clips them at 255 when it converts them.

    Raises:
        ValueError: float pixels, or integers beyond 16 bits, whose range nobody has agreed on.
    """
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range")
    if not picture.mode.startswith("I"):
        return picture
    wide = np.asarray(picture).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("integer pixels beyond 16 bits have no agreed range")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
