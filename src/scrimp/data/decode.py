"""One picture, from a file, bytes or a PIL image, to a uint8 tensor [C, H, W] of a given size. Deterministic."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.pixels import eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Source = str | os.PathLike[str] | bytes

KEPT_SIZE = 64
"""Longest side in pixels up to which a set of one size keeps it when no size is asked for."""
DEFAULT_SIZE = 224
"""Side in pixels of every other set when no size is asked for."""

_GREY = frozenset({"1", "L", "LA", "La", "I", "F"})
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


class ImageError(InputError):
    """A picture that cannot be decoded, by name. Comes out of a DataLoader's worker as what it is."""

    def __init__(self, expected: str, got: str | None = None, remedy: str | None = None) -> None:
        if got is None or remedy is None:
            # torch rebuilds a worker's exception from one text: the worker's traceback, our line last.
            line = expected.strip().rpartition("\n")[2]
            found = re.search(r"expected (.*?); got (.*); (.*)$", line)
            expected, got, remedy = found.groups() if found else (line, "", "")
        super().__init__(expected, got, remedy)

    @classmethod
    def of(cls, name: str, reason: str) -> ImageError:
        return cls(
            "a readable image",
            f"{name!r} ({reason})",
            "replace or remove it, or leave such images out with on_corrupt='skip'",
        )


class Peek(NamedTuple):
    """What the head of a picture says, its EXIF orientation heeded."""

    size: tuple[int, int]  # height, width
    grey: bool


def decode_image(source: Source, *, size: tuple[int, int], mode: str, name: str | None = None) -> Tensor:
    """Decode one picture (the first frame of an animated one).

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits. The picture
    is then cut centrally to the aspect ratio of ``size`` and resized to it, antialiased: for a square this is
    "short side, then centre crop" in one step.

    Args:
        source: a path, or the encoded bytes.
        size: height and width in pixels.
        mode: ``"RGB"`` (C = 3) or ``"L"`` (grey, C = 1).
        name: what an error calls the picture; the path when not given.

    Returns:
        uint8 [C, H, W].

    Raises:
        ImageError: it cannot be read or decoded whole.
    """
    from PIL import Image

    called = name or ("bytes" if isinstance(source, bytes) else os.fspath(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            _draft(picture, max(size))
            picture.load()
            _turn_upright(picture)
            return picture_pixels(picture, size=size, mode=mode)
    except _damage() as error:
        raise ImageError.of(called, _reason(error, source)) from error


def picture_pixels(picture: Picture, *, size: tuple[int, int], mode: str) -> Tensor:
    """A PIL image as uint8 [C, H, W]; arguments as for `decode_image`.

    Raises:
        ValueError: its pixels are 32-bit numbers without an agreed range.
    """
    from PIL import Image, ImageOps

    flat = eight_bits(picture)
    if flat.has_transparency_data:
        white = Image.new("RGBA", flat.size, "white")
        flat = Image.alpha_composite(white, flat.convert("RGBA"))
    if flat.mode != mode:
        flat = flat.convert(mode)
    if flat.size != (size[1], size[0]):
        flat = ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.BILINEAR)
    values = np.asarray(flat)
    return torch.from_numpy(np.array(values[None] if mode == "L" else values.transpose(2, 0, 1), order="C"))


def peek_image(source: Source) -> Peek | None:
    """Size and colour from the head of a file or of bytes, without decoding; ``None`` when it is unreadable."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return peek_picture(picture)
    except _damage():
        return None


def peek_picture(picture: Picture) -> Peek:
    """Size and colour of an opened PIL image."""
    width, height = picture.size
    grey = picture.mode in _GREY or picture.mode.startswith("I;16")
    # A PNG without EXIF in its head would be decoded whole only to look for it.
    has_exif = "exif" in picture.info or picture.format == "TIFF"
    if width != height and has_exif and picture.getexif().get(0x0112) in _TURNED:
        height, width = width, height
    return Peek((height, width), grey)


def common_form(peeks: Iterable[Peek | None], size: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
    """Size and mode that suit a whole set: its own size where all agree on one up to `KEPT_SIZE`, else `DEFAULT_SIZE`
    square; ``"L"`` where every picture is grey. Stops reading as soon as neither can change any more."""
    sizes: set[tuple[int, int]] = set()
    grey = True
    for peek in peeks:
        if peek is None:
            continue
        sizes.add(peek.size)
        grey = grey and peek.grey
        if not grey and (size is not None or len(sizes) > 1 or max(peek.size) > KEPT_SIZE):
            break
    mode = "L" if grey and sizes else "RGB"
    if size is not None:
        return size, mode
    own = next(iter(sizes)) if len(sizes) == 1 else (DEFAULT_SIZE, DEFAULT_SIZE)
    return (own if max(own) <= KEPT_SIZE else (DEFAULT_SIZE, DEFAULT_SIZE)), mode


def _draft(picture: Picture, side: int) -> None:
    """Let libjpeg shrink while it decodes, to no less than twice what is needed, so that resizing stays smooth."""
    scale = 2 * side / min(picture.size)
    if scale < 1:
        picture.draft(None, (round(picture.width * scale), round(picture.height * scale)))


def _turn_upright(picture: Picture) -> None:
    from PIL import ImageOps

    # A damaged note about the camera is no reason to lose a sound picture.
    with contextlib.suppress(*_damage()):
        ImageOps.exif_transpose(picture, in_place=True)


def _damage() -> tuple[type[Exception], ...]:
    """What PIL's readers are known to raise on damaged or foreign bytes."""
    from PIL import Image

    return (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        LookupError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )


def _reason(error: Exception, source: Source) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        length = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        return "no image format recognised" if length else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
