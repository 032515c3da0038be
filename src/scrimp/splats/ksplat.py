"""The .ksplat of mkkellogg's GaussianSplats3D: sections of rows, plain, or of 16 bits beside centres of buckets.

The format has no document of its own; these are the facts of that viewer's SplatBuffer. Level 0 stores float32. Level 1
stores positions as 16 bits around the centre of a bucket of Gaussians, the rest as float16; level 2 harmonics as bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scrimp.splats.activations import coefficients_of, logits_of, logs_of
from scrimp.splats.reading import Cursor, splats_of
from scrimp.splats.scene import COUNTS, Splats

_HEADER = np.dtype(
    {
        "names": ["major", "minor", "sections", "count", "level", "least", "most"],
        "formats": ["u1", "u1", "<u4", "<u4", "<u2", "<f4", "<f4"],
        "offsets": [0, 1, 4, 16, 20, 36, 40],
        "itemsize": 4096,
    }
)
_SECTION = np.dtype(
    {
        "names": ["count", "room", "bucket_size", "buckets", "block", "bucket_bytes", "range", "full", "partial", "sh"],
        "formats": ["<u4", "<u4", "<u4", "<u4", "<f4", "<u2", "<u4", "<u4", "<u4", "<u2"],
        "offsets": [0, 4, 8, 12, 16, 20, 24, 32, 36, 40],
        "itemsize": 1024,
    }
)
_LEVELS = (("<f4", "<f4", "<f4"), ("<u2", "<f2", "<f2"), ("<u2", "<f2", "u1"))
"""By level the types of positions, of scales and rotations, and of harmonics."""
_CENTRE = 12  # bytes
_RANGE = 32767  # of positions in half a block, where a section names none
_HARMONICS = 1.5  # bytes reach from minus this to this, where a file names nothing else


@np.errstate(over="ignore", invalid="ignore")  # numbers may be NaN or too large: then so are the Gaussians
def read_ksplat(data: bytes | memoryview, name: str) -> Splats:
    """Read a .ksplat of level 0, 1 or 2, harmonics up to degree 3.

    Where sections have different degrees, missing coefficients are 0. Alphas of 0 and 1 and sizes of 0 are read as
    `scrimp.splats.activations` says.

    Raises:
        InputError: damaged, truncated, or of another version or level.
    """
    cursor = Cursor(data, format=".ksplat", name=name)
    header = _named(cursor.array(_HEADER, 1)[0])
    if header["major"] != 0 or header["minor"] < 1 or header["level"] >= len(_LEVELS):
        raise cursor.wrong("version {major}.{minor} of level {level}, not 0.1 or later of 0 to 2".format(**header))
    sections = [_named(section) for section in cursor.array(_SECTION, header["sections"])]
    if any(section["count"] > section["room"] or section["sh"] > 3 for section in sections):
        raise cursor.wrong("a section with more Gaussians than room, or harmonics above degree 3")
    degree = max((section["sh"] for section in sections if section["count"]), default=0)
    parts = [_section(cursor, header, section, degree=degree) for section in sections]
    count = sum(len(part["means"]) for part in parts)
    if count != header["count"]:
        raise cursor.wrong(f"{count} Gaussians in its sections, where its header has {header['count']}")
    empty = {"means": 3, "quaternions": 4, "scales": 3, "opacities": 0, "colors": 3}
    found = {field: np.zeros((0, width) if width else 0, np.float32) for field, width in empty.items()}
    found |= {"harmonics": np.zeros((0, 0, 3), np.float32)}
    if parts:
        found = {field: np.concatenate([part[field] for part in parts]) for field in found}
    return splats_of(found)


def _named(row: Any) -> dict[str, Any]:
    """Python's own numbers: products of claimed sizes must not wrap around."""
    return {title: row[title].item() for title in row.dtype.names}


def _section(cursor: Cursor, header: dict[str, Any], section: dict[str, Any], *, degree: int) -> dict[str, np.ndarray]:
    if section["buckets"] and section["bucket_bytes"] != _CENTRE:
        raise cursor.wrong(f"centres of {section['bucket_bytes']} bytes, where {_CENTRE} are known")
    lengths = cursor.array("<u4", section["partial"])
    centres = cursor.array("<f4", section["buckets"], 3)
    position, half, harmonic = _LEVELS[header["level"]]
    rest = ("rest", harmonic, 3 * COUNTS[section["sh"]])
    row = np.dtype(
        [("mean", position, 3), ("size", half, 3), ("quaternion", half, 4), ("color", "u1", 4)]
        + ([rest] if section["sh"] else [])
    )
    rows = cursor.array(row, section["room"])[: section["count"]]
    units = np.arange(256) / 255
    return {
        "means": _means(cursor, rows["mean"], section, lengths=lengths, centres=centres),
        "quaternions": rows["quaternion"].astype(np.float32),
        "scales": logs_of(rows["size"]),
        "opacities": logits_of(units)[rows["color"][:, 3]],
        "colors": coefficients_of(units)[rows["color"][:, :3]],
        "harmonics": _harmonics(rows, header, section["sh"], degree=degree),
    }


def _means(
    cursor: Cursor, codes: np.ndarray, section: dict[str, Any], *, lengths: np.ndarray, centres: np.ndarray
) -> np.ndarray:
    if codes.dtype.kind == "f" or not len(codes):
        return codes.astype(np.float32)
    size, full = section["bucket_size"], section["full"]
    index = np.arange(len(codes))
    late = index >= full * size
    index[~late] //= max(size, 1)
    index[late] = full + np.searchsorted(lengths.cumsum(dtype=np.uint64), index[late] - full * size, side="right")
    if index[-1] >= full + len(lengths) or full + len(lengths) > len(centres):
        raise cursor.wrong("Gaussians in buckets that there are not")
    reach = section["range"] or _RANGE
    offsets = (codes.astype(np.float32) - reach) * np.float32(section["block"] / 2 / reach)
    return np.asarray(offsets + centres[index])


def _harmonics(rows: np.ndarray, header: dict[str, Any], own: int, *, degree: int) -> np.ndarray:
    """Stored degree after degree, in each by channel."""
    found = np.zeros((len(rows), COUNTS[degree], 3), np.float32)
    for band in range(1, min(own, degree) + 1):  # an empty section may name a higher one
        start, stop = band * band - 1, band * (band + 2)
        stored = rows["rest"][:, 3 * start : 3 * stop].astype(np.float32)
        found[:, start:stop] = stored.reshape(len(rows), 3, stop - start).transpose(0, 2, 1)
    if header["level"] == 2:
        low, high = header["least"] or -_HARMONICS, header["most"] or _HARMONICS
        own_part = found[:, : COUNTS[own]]
        own_part *= np.float32((high - low) / 255)
        own_part += np.float32(low)
    return found
