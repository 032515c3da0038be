"""Our own container: the smallest we know how to make, specified bit for bit in docs/splat-container.md.

What is lost is bounded by `bounds` and measured in pictures by whoever renders. Gaussians come back in another order
and in the canonical form of `scrimp.splats.canonical`: the same Gaussians, their axes sorted.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats import codec
from scrimp.splats.canonical import canonical
from scrimp.splats.checks import refuse_bad
from scrimp.splats.codec import OCTAVE, Grid, Settings
from scrimp.splats.container_streams import NAMES, Shape, read_streams, write_streams
from scrimp.splats.scene import COUNTS, Splats

MAGIC = b"SCRIMPGS"
VERSION = 1
UNSEEN = 1 / 255
"""Alphas below this change no picture of 8 bits: renderers leave such Gaussians out."""
_HEADER = struct.Struct("<8sHBBIIHHhBBfffI6Bh3d9I")
_CHECK = slice(16, 20)


@dataclass(frozen=True)
class Bounds:
    """By how much a decoded Gaussian can differ from the canonical one that was encoded.

    Attributes:
        alpha: octaves; alphas below 2**-16 or above 1 - 2**-12 are first brought there.
        scale: octaves; scales more than ``thinnest`` octaves below the longest are first brought there.
        position: along each axis, as a part of the middle scale.
        position_extent: the same as a part of the widest extent of the scene; the greater of the two holds.
        quaternion: Euclidean distance of x, y, z where axes differ by 8 times.
        color: of each coefficient of degree 0.
        harmonics: Euclidean distance of all coefficients above over the root of their number, beside 1 % of their
            length; None with a palette.
    """

    alpha: float
    scale: float
    position: float
    position_extent: float
    quaternion: float
    color: float
    harmonics: float | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scene made ready to be encoded, once for many settings."""

    splats: Splats
    visible: Tensor


def prepare(splats: Splats, *, importance: Tensor | None = None, prune: bool = False, extra: bool = True) -> Prepared:
    """Check a scene and bring it into canonical form; see `encode`."""
    splats = splats.to("cpu")
    if splats.extra and not extra:
        splats = replace(splats, extra={})
    refuse_bad(splats, "the container")
    if importance is not None:
        _check_importance(importance, len(splats))
    visible = codec.visibility(splats) if importance is None else importance.detach().to("cpu", torch.float64)
    if prune:
        kept = splats.opacities.sigmoid() >= UNSEEN
        splats, visible = (splats, visible) if bool(kept.all()) else (splats.take(kept), visible[kept])
    return Prepared(canonical(splats), visible)


def encode(
    splats: Splats,
    *,
    settings: Settings | None = None,
    importance: Tensor | None = None,
    prune: bool = False,
    extra: bool = True,
) -> bytes:
    """The scene as the bytes of one file. See `scrimp.splats.rate` for named qualities and sizes.

    Args:
        splats: on any device.
        settings: how finely each field is stored.
        importance: [n], how much an error in each Gaussian shows, such as the root of the sum of its squared weights in
            pictures; `codec.visibility` where omitted.
        prune: leave out Gaussians of an alpha below `UNSEEN`, which no picture of 8 bits shows.
        extra: keep extra fields, losslessly; else drop them.

    Raises:
        InputError: numbers that are not finite, by field; extra fields of a type that has no place; or an importance of
            another shape.
    """
    return encode_prepared(prepare(splats, importance=importance, prune=prune, extra=extra), settings or Settings())


def encode_prepared(scene: Prepared, settings: Settings) -> bytes:
    """`encode` of what `prepare` returned."""
    settings = _as_stored(settings)
    streams, shape, _ = write_streams(scene.splats, settings, scene.visible)
    body = b"".join(streams[name] for name in NAMES)
    head = _packed(settings, shape, [len(streams[name]) for name in NAMES])
    # Readers allocate no more Gaussians than a file has bytes.
    data = bytearray((head + body).ljust(shape.count, b"\0"))
    data[_CHECK] = struct.pack("<I", zlib.crc32(data))
    return bytes(data)


def decode(data: bytes) -> Splats:
    """The scene of a file: float32, canonical, in the file's order.

    Raises:
        InputError: no such file, of a later version, or damaged.
    """
    settings, shape, lengths = _unpacked(bytes(data[: _HEADER.size]), len(data))
    plain = bytearray(data)
    plain[_CHECK] = b"\0\0\0\0"
    if zlib.crc32(plain) != int.from_bytes(data[_CHECK], "little"):
        raise InputError("a file with the checksum it was written with", "another", "copy it again")
    streams, place = {}, _HEADER.size
    for name, length in zip(NAMES, lengths, strict=True):
        streams[name] = bytes(data[place : place + length])
        place += length
    splats = read_streams(streams, settings, shape)
    refuse_bad(splats, "the file", "copy it again")
    return splats


def bounds(settings: Settings, level: int | None = None) -> Bounds:
    """What an encoding with these settings may lose in a Gaussian of a level; the coarsest where omitted."""
    settings = _as_stored(settings)
    level = settings.levels - 1 if level is None else level
    opacity, scale, position, rotation, color, harmonics = (2.0 ** min(level, cap) for cap in settings.caps)
    scale_error = 0.5 * settings.scale * scale / OCTAVE
    return Bounds(
        alpha=0.5 * settings.opacity * opacity / OCTAVE,
        scale=scale_error,
        # The cell follows from the rounded scale, and never exceeds what the settings ask for.
        position=0.5 * position * 2 ** (settings.position / OCTAVE + scale_error),
        position_extent=2.0**-codec.GRID_LEVELS * 2,
        quaternion=0.5 * math.sqrt(3) * rotation * settings.rotation,
        color=0.5 * color * settings.color * codec.COLOR_GAIN,
        harmonics=None if settings.palette else 0.58 * harmonics * settings.harmonics,
    )


def _check_importance(importance: Tensor, count: int) -> None:
    good = importance.shape == (count,) and bool(importance.isfinite().all()) and bool((importance >= 0).all())
    if not good:
        got = f"{list(importance.shape)}, or some negative, infinite or NaN"
        raise InputError(f"a finite importance >= 0 of each of {count} Gaussians", got, "pass one number each")


def _as_stored(settings: Settings) -> Settings:
    """With the fractions that the header has digits for."""
    steps = struct.pack("<fff", settings.rotation, settings.color, settings.harmonics)
    rotation, color, harmonics = struct.unpack("<fff", steps)
    return replace(settings, rotation=rotation, color=color, harmonics=harmonics)


def _packed(settings: Settings, shape: Shape, lengths: list[int]) -> bytes:
    grid = shape.grid
    return _HEADER.pack(
        MAGIC,
        VERSION,
        shape.degree,
        settings.levels,
        shape.count,
        0,
        settings.opacity,
        settings.scale,
        settings.position,
        grid.levels,
        int(shape.antialiased),
        settings.rotation,
        settings.color,
        settings.harmonics,
        settings.palette,
        *settings.caps,
        grid.exponent,
        *grid.origin,
        *lengths,
    )


def _unpacked(head: bytes, size: int) -> tuple[Settings, Shape, tuple[int, ...]]:
    if len(head) < _HEADER.size or head[:8] != MAGIC:
        raise InputError(f"a file that begins with {MAGIC.decode()}", f"{head[:8]!r}", "pass a file of this container")
    _, version, degree, levels, count, _, *rest = _HEADER.unpack(head)
    if version != VERSION:
        raise InputError(f"version {VERSION} of the container", f"{version}", "install the version that wrote it")
    opacity, scale, position, grid_levels, flags, rotation, color, harmonics, palette, *rest = rest
    caps, exponent, origin, lengths = tuple(rest[:6]), rest[6], tuple(rest[7:10]), tuple(rest[10:])
    fits = sum(lengths) + _HEADER.size <= size and count <= size and degree < len(COUNTS)
    fits = fits and flags <= 1 and grid_levels <= codec.GRID_LEVELS
    fits = fits and abs(exponent) <= 1000 and all(map(math.isfinite, origin))
    if not fits:
        got = f"one of {size} bytes that says {count} Gaussians in {sum(lengths)} bytes"
        raise InputError("a whole file", got, "copy it again")
    settings = Settings(opacity, scale, position, rotation, color, harmonics, palette, levels, caps)
    return settings, Shape(count, degree, Grid(origin, exponent, grid_levels), bool(flags)), lengths
