"""The .spz container, versions 2 to 4: a header and six streams of bytes (facts: github.com/nianticlabs/spz).

- 2 and 3: one gzip stream of a 16-byte header, the six streams one after another, then extensions.
- 4: a 32-byte header as it is, then extensions, then sizes, then each stream that is not empty as a Zstandard frame.

Header, little-endian: "NGSP", u32 version, u32 count, u8 degree, u8 fractional bits, u8 flags, u8 streams (0 before
version 4); in version 4 also u32 offset of the sizes and 12 bytes of 0. Sizes: u64 compressed, u64 plain, each stream.
Extensions: u32 type, u32 length, so many bytes.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from typing import Any

from scrimp.primitives.errors import InputError, require
from scrimp.splats.reading import Cursor, damaged, inflate
from scrimp.splats.scene import COUNTS

STREAMS = ("positions", "alphas", "colors", "scales", "rotations", "harmonics")
AXES = ("LDB", "RDB", "LUB", "RUB", "LDF", "RDF", "LUF", "RUF")
"""Where x, y and z point (left, right, down, up, back, front), as the extension numbers them from 1."""
_HEAD, _HEAD_4 = struct.Struct("<4sIIBBBB"), struct.Struct("<4sIIBBBBI12x")
_MAGIC = b"NGSP"
_ANTIALIASED, _EXTENDED = 1, 2
_COORDINATES = 0xADBE0003
_MOST_EXTENSIONS = 1 << 16
_MOST_RATIO, _SPARE = 1024, 1 << 22  # of plain to compressed bytes: about the most that deflate reaches
_LEVEL = 12


@dataclass(frozen=True, eq=False)
class SpzStreams:
    """What a .spz file holds.

    Attributes:
        version: 2, 3 or 4.
        count: of Gaussians.
        degree: of the harmonics, 0 to 4.
        fractional_bits: of a position.
        axes: of `AXES`; ``None`` where the file does not say.
        antialiased: trained with the compensation of Mip-Splatting.
        streams: bytes of each of `STREAMS`.
    """

    version: int
    count: int
    degree: int
    fractional_bits: int
    axes: str | None
    antialiased: bool
    streams: dict[str, bytes]


def stream_sizes(version: int, count: int, degree: int) -> dict[str, int]:
    """Plain bytes of each stream."""
    each = (9, 1, 3, 3, 3 if version == 2 else 4, 3 * COUNTS[degree])
    return {name: count * size for name, size in zip(STREAMS, each, strict=True)}


def pack_spz(spz: SpzStreams) -> bytes:
    """A .spz file.

    Raises:
        MissingExtraError: version 4 without a Zstandard library.
    """
    extensions = b"" if spz.axes is None else struct.pack("<III", _COORDINATES, 4, AXES.index(spz.axes) + 1)
    flags = _ANTIALIASED * spz.antialiased + _EXTENDED * bool(extensions)
    head = (_MAGIC, spz.version, spz.count, spz.degree, spz.fractional_bits, flags)
    plain = [spz.streams[name] for name in STREAMS]
    if spz.version < 4:
        squeeze = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        parts = [_HEAD.pack(*head, 0), *plain, extensions]
        return b"".join([*(squeeze.compress(part) for part in parts), squeeze.flush()])
    frames = [(len(stream), _zstd_compress(stream)) for stream in plain if stream]
    sizes = b"".join(struct.pack("<QQ", len(frame), size) for size, frame in frames)
    start = _HEAD_4.pack(*head, len(frames), _HEAD_4.size + len(extensions))
    return b"".join([start, extensions, sizes, *(frame for _, frame in frames)])


def unpack_spz(data: bytes | memoryview, name: str) -> SpzStreams:
    """Take a .spz file apart. Nothing is made of it that is larger than its header and its own bytes allow.

    Raises:
        InputError: damaged, truncated, of another version, or with axes that are turned by a quarter.
        MissingExtraError: version 4 without a Zstandard library.
    """
    gzipped = bytes(data[:2]) == b"\x1f\x8b"
    head = _peek(data, name) if gzipped else bytes(data[: _HEAD.size])
    if len(head) < _HEAD.size or head[:4] != _MAGIC:
        raise damaged(".spz", name, "no header of a .spz file")
    _, version, count, degree, bits, flags, _ = _HEAD.unpack(head)
    if version not in ((2, 3) if gzipped else (4,)):
        raise InputError("a .spz file of version 2, 3 or 4", f"{name} of version {version}", "export it again")
    if degree >= len(COUNTS) or bits > 30:
        raise damaged(".spz", name, f"harmonics of degree {degree}, {bits} fractional bits")
    sizes = stream_sizes(version, count, degree)
    take = _take_gzip if gzipped else _take_zstd
    streams, extensions = take(data, sizes, name)
    axes = _axes_of(extensions, name) if flags & _EXTENDED else None
    return SpzStreams(version, count, degree, bits, axes, bool(flags & _ANTIALIASED), streams)


def _peek(data: bytes | memoryview, name: str) -> bytes:
    """The header inside a gzip stream: it says how much may come out of the rest."""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(bytes(data[:4096]), _HEAD.size)
    except zlib.error as error:
        raise damaged(".spz", name, f"its compressed bytes cannot be read ({error})") from error


def _take_gzip(data: bytes | memoryview, sizes: dict[str, int], name: str) -> tuple[dict[str, bytes], bytes]:
    limit = _HEAD.size + sum(sizes.values()) + _MOST_EXTENSIONS
    cursor = Cursor(inflate(data, limit, format=".spz", name=name), format=".spz", name=name)
    cursor.take(_HEAD.size)
    streams = {title: bytes(cursor.take(size)) for title, size in sizes.items()}
    return streams, bytes(cursor.take(cursor.left))


def _take_zstd(data: bytes | memoryview, sizes: dict[str, int], name: str) -> tuple[dict[str, bytes], bytes]:
    cursor = Cursor(data, format=".spz", name=name)
    *_, frames, offset = _HEAD_4.unpack(cursor.take(_HEAD_4.size))
    wanted = [(title, size) for title, size in sizes.items() if size]
    if sum(sizes.values()) > _MOST_RATIO * len(data) + _SPARE or frames != len(wanted):
        raise damaged(".spz", name, f"{frames} streams in {len(data)} bytes, too few for what the header claims")
    extensions = bytes(cursor.take(offset - _HEAD_4.size))
    table = [struct.unpack("<QQ", cursor.take(16)) for _ in wanted]
    streams = dict.fromkeys(STREAMS, b"")
    for (title, size), (packed, plain) in zip(wanted, table, strict=True):
        if plain != size:
            raise damaged(".spz", name, f"{plain} bytes of {title}, where {size} are needed")
        streams[title] = _zstd_decompress(cursor.take(packed), size, name)
    cursor.end()
    return streams, extensions


def _axes_of(extensions: bytes, name: str) -> str | None:
    """What the extension on coordinates says; others are skipped, as their readers do."""
    cursor, found = Cursor(extensions, format=".spz", name=name), 0
    while cursor.left:
        kind, length = struct.unpack("<II", cursor.take(8))
        content = cursor.take(length)
        if kind == _COORDINATES and length == 4:
            found = int.from_bytes(content, "little")
    if found > len(AXES):
        got = f"{name} with coordinate system {found}, where y is no vertical axis"
        raise InputError(f"axes out of: {', '.join(AXES)}", got, "export it with others")
    return AXES[found - 1] if found else None


def _zstd() -> Any:
    """Python's own from 3.14 on, else the package."""
    return require("compression.zstd" if sys.version_info >= (3, 14) else "zstandard", "splats")


def _zstd_compress(plain: bytes) -> bytes:
    return _zstd().compress(plain, _LEVEL)


def _zstd_decompress(frame: memoryview, size: int, name: str) -> bytes:
    """Exactly ``size`` bytes; no more than one above that is ever held."""
    library = _zstd()
    try:
        plain = _zstd_read(library.ZstdDecompressor(), frame, size + 1)
    except (library.ZstdError, EOFError) as error:
        raise damaged(".spz", name, f"its compressed bytes cannot be read ({error})") from error
    if len(plain) != size:
        raise damaged(".spz", name, f"another number of bytes than {size} once decompressed")
    return plain


def _zstd_read(decompressor: Any, frame: memoryview, most: int) -> bytes:
    if sys.version_info >= (3, 14):
        return decompressor.decompress(frame, max_length=most)
    # The package's own `decompress` allocates whatever size the frame claims.
    with decompressor.stream_reader(frame) as reader:
        return reader.read(most)
