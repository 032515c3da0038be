"""Photographs with poses as a set's files state them, and their pixels as the files hold them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.pixels import eight_bits
from scrimp.splats.distortion import Lens

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_ENDINGS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".webp", ".tif", ".tiff")
_OUT_OF_TRUE = 1e-2  # most by which the columns of a pose may miss being perpendicular and of length 1


@dataclass(frozen=True, eq=False)
class Photo:
    """One photograph.

    Attributes:
        name: as its set calls it.
        image: its file.
        lens: for the file's own size.
        world_to_camera: float64 [4, 4], x to the right, y down, z forwards.
        mask: a file, black where the photograph must not count.
    """

    name: str
    image: Path
    lens: Lens
    world_to_camera: Tensor
    mask: Path | None = None


@dataclass(frozen=True, eq=False)
class Posed:
    """What a set states.

    Attributes:
        photos: those whose files are there.
        missing: names of the others.
        held_out: names of those to test on; ``None`` where the set does not say.
        points: float32 [n, 3], where it has them.
        colors: uint8 [n, 3], of the points.
    """

    photos: list[Photo]
    missing: list[str] = field(default_factory=list)
    held_out: frozenset[str] | None = None
    points: Tensor | None = None
    colors: Tensor | None = None


def find_file(folder: Path, name: str) -> Path | None:
    """A file by its whole name, with an image's ending added, or with another image's ending.

    Sets leave endings out, add them to masks, and change them where they are reduced. Names written on Windows are
    found too.
    """
    plain = name.replace("\\", "/")
    if not folder.is_dir() or not plain.strip("/.") or "\0" in plain:
        return None
    path = folder / plain
    stems = [path, path.with_suffix("")] if path.suffix in _ENDINGS else [path]
    others = [stem.with_name(stem.name + ending) for stem in stems for ending in _ENDINGS]
    try:
        return next((file for file in [path, *others] if file.is_file()), None)
    except OSError:  # a name longer than any file's
        return None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as its pixels lie, from its head.

    Raises:
        InputError: it is no image.
    """
    with _opened(path) as picture:
        return picture.size


def fit_lens(lens: Lens, image: Path) -> Lens:
    """A lens for the size that the file has: sets are reduced into other folders without changing what they state.

    Raises:
        InputError: a picture of other proportions.
    """
    width, height = image_size(image)
    # A side rounded up or down, on either of the two.
    if abs(width * lens.height - height * lens.width) > 1.5 * max(lens.width, lens.height, width, height):
        turned = "turn the files upright as they were when the poses were found, or " if width != height else ""
        got = f"{image}: {width} x {height}"
        raise InputError(f"the proportions of {lens.width} x {lens.height}", got, f"{turned}pass other images")
    return lens.resized(width, height)


def rigid(rotation: Tensor, shift: Tensor, *, name: str) -> Tensor:
    """A motion float64 [4, 4], its rotation the nearest true one.

    Args:
        rotation: [3, 3], nearly one.
        shift: [3].
        name: what an error calls it.

    Raises:
        InputError: it scales, shears or mirrors, or is not finite.
    """
    motion = torch.eye(4, dtype=torch.float64)
    whole = bool(torch.isfinite(rotation).all() and torch.isfinite(shift).all())
    off = (rotation.T @ rotation - motion[:3, :3]).abs().max() if whole else torch.inf
    if off > _OUT_OF_TRUE or torch.linalg.det(rotation) < 0:
        raise InputError("poses that turn and move, nothing else", f"another for {name}", "export the poses again")
    u, _, v = torch.linalg.svd(rotation)
    motion[:3, :3], motion[:3, 3] = u @ v, shift
    return motion


def read_pixels(path: Path, size: tuple[int, int], background: tuple[float, float, float]) -> Tensor:
    """An image file reduced to a size, antialiased; transparency is laid on the background first.

    Args:
        size: width and height, of which neither exceeds the file's.
        background: red, green, blue from 0 to 1.

    Returns:
        uint8 [h, w, 3].

    Raises:
        InputError: it cannot be decoded whole.
    """
    from PIL import Image

    with _opened(path) as picture:
        box = _draft(picture, size)
        flat = eight_bits(picture)
        if flat.has_transparency_data:
            clear = tuple(round(255 * value) for value in background)
            flat = Image.alpha_composite(Image.new("RGBA", flat.size, (*clear, 255)), flat.convert("RGBA"))
        return _resized(flat.convert("RGB"), size, box)


def read_alpha(path: Path, size: tuple[int, int]) -> Tensor | None:
    """How opaque an image file is, reduced to a size: uint8 [h, w, 1], or ``None`` where it has no transparency."""
    with _opened(path) as picture:
        if not picture.has_transparency_data:
            return None
        return _resized(picture.convert("RGBA").getchannel("A"), size, None)


def read_grey(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file, reduced or enlarged to a size, as uint8 [h, w, 1]."""
    with _opened(path) as picture:
        return _resized(eight_bits(picture).convert("L"), size, None)


@contextmanager
def _opened(path: Path) -> Iterator[Picture]:
    from PIL import Image

    # What PIL's readers are known to raise on damaged or foreign bytes.
    damage = (SyntaxError, ValueError, EOFError, LookupError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as picture:
            yield picture
    except InputError:
        raise
    except (OSError, *damage) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError("a readable image", f"{path} ({reason})", "replace it, or leave it out of the set") from error


def _draft(picture: Picture, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Let libjpeg shrink while it decodes, to no less than twice what is needed; returns where the picture lies in
    that, since the last pixels may lie partly beyond it."""
    drafted = picture.draft(None, (2 * size[0], 2 * size[1]))
    return None if drafted is None else drafted[1]


def _resized(picture: Picture, size: tuple[int, int], box: tuple[float, float, float, float] | None) -> Tensor:
    from PIL import Image

    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC, box=box)
    values = np.array(picture)
    return torch.from_numpy(values if values.ndim == 3 else values[..., None])
