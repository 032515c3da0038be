"""Numbers of Gaussians as pixels of lossless WebP images."""

from __future__ import annotations

import io
import math

import numpy as np

from scrimp.primitives.errors import InputError, require
from scrimp.splats.reading import damaged

MOST_SIDE = 16383
"""Of a WebP image, pixels."""
_SPARE = 1 << 16


def grid(count: int) -> tuple[int, int]:
    """Width and height of an image that holds a pixel for each of ``count``, about square, at least 1 x 1."""
    width = max(1, math.ceil(math.sqrt(count) / 4) * 4)
    height = max(1, math.ceil(count / width))
    if max(width, height) > MOST_SIDE:
        raise InputError(
            f"at most {MOST_SIDE}**2 Gaussians in one .sog", f"{count}", "write several, or another format"
        )
    return width, height


def encode_image(values: np.ndarray, size: tuple[int, int]) -> bytes:
    """A lossless WebP image whose pixels, row by row, are these.

    Args:
        values: [n, 3 or 4] uint8. Pixels beyond them repeat the last, so that they cost next to nothing.
        size: width and height, at least n pixels.
    """
    images = require("PIL.Image", "splats")
    width, height = size
    pixels = np.zeros((width * height, values.shape[1]), np.uint8)
    pixels[: len(values)] = values
    pixels[len(values) :] = values[-1:] if len(values) else 0
    buffer = io.BytesIO()
    image = images.fromarray(np.ascontiguousarray(pixels.reshape(height, width, -1)))
    image.save(buffer, "WEBP", lossless=True, exact=True, method=4, quality=80)
    return buffer.getvalue()


def decode_image(data: bytes, count: int, name: str, *, most: int | None = None) -> tuple[np.ndarray, int]:
    """Pixels of a lossless WebP or .png.

    Args:
        count: of pixels that are needed.
        name: of the file, for errors.
        most: pixels; a larger image is refused before it is decoded. By default four times those needed, and some.

    Returns:
        [at least count, 4] uint8, row by row, and the image's width.

    Raises:
        InputError: no such image, or one of another size.
    """
    images = require("PIL.Image", "splats")
    most = 4 * count + _SPARE if most is None else most
    try:
        with images.open(io.BytesIO(data), formats=("WEBP", "PNG")) as image:
            width, height = image.size
            if not count <= width * height <= most:
                raise damaged(".sog", name, f"{width} x {height} pixels, where {count} are needed")
            pixels = np.asarray(image.convert("RGBA"))
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of many kinds on damaged bytes
        raise damaged(".sog", name, f"an image that cannot be read ({type(error).__name__})") from error
    return pixels.reshape(-1, 4), width
