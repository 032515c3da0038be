"""PlayCanvas' compressed .ply: 16 bytes a Gaussian within the bounds of its chunk of 256, and a byte a harmonic.

Three elements: `chunk` holds bounds of position, scale and (not in older files) colour; `vertex` four packed words:
positions and scales of 11, 10 and 11 bits, rotations as the smallest three components of 10 bits after 2 that name the
largest, colours and alpha of 8 bits; `sh` the harmonics by channel, in steps of 1/32 over -4 to 4. The format has no
document of its own; these are the facts of PlayCanvas' splat-transform.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scrimp.splats.activations import LEAST_SCALE, alphas_of, coefficients_of, logits_of, rgb_of
from scrimp.splats.checks import refuse_bad, refuse_loss
from scrimp.splats.morton import morton_order
from scrimp.splats.ply import blocks, count_rest, rest_names
from scrimp.splats.ply_header import Header, header_bytes, parse_header, read_elements
from scrimp.splats.reading import damaged, splats_of
from scrimp.splats.scene import Splats
from scrimp.splats.smallest_three import pack, unpack

_CHUNK = 256
_BOUNDS = {
    field: [f"{side}_{end}" for side in ("min", "max") for end in ends]
    for field, ends in {"position": "xyz", "scale": ("scale_x", "scale_y", "scale_z"), "color": "rgb"}.items()
}
_WORDS = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
_BITS = {"position": (11, 10, 11), "scale": (11, 10, 11), "color": (8, 8, 8, 8)}


def is_compressed(header: Header) -> bool:
    """Whether a .ply's header is that of this format."""
    element = header.find("vertex")
    return element is not None and "packed_position" in element.names and header.find("chunk") is not None


def read_compressed_ply(data: bytes | memoryview, name: str) -> Splats:
    """Read a compressed .ply, of harmonics up to degree 4, with or without bounds of colour.

    Alphas of 0 and 1 are read as `scrimp.splats.activations` says.

    Raises:
        InputError: damaged, truncated, or too few chunks.
    """
    header = parse_header(data, name)
    harmonics = header.find("sh")
    wanted = ["chunk", "vertex", *(["sh"] if harmonics else [])]
    found = read_elements(data, header, wanted, name)
    chunks, rows = found["chunk"], found["vertex"]
    _check(chunks, rows, name)
    with np.errstate(invalid="ignore", over="ignore"):  # bounds may be NaN: then so are the Gaussians
        colors = _unpack(rows["packed_color"], _BITS["color"])
        rgb = _within(colors[:, :3], chunks, "color") if "min_r" in (chunks.dtype.names or ()) else colors[:, :3]
        tensors = {
            "means": _within(_unpack(rows["packed_position"], _BITS["position"]), chunks, "position"),
            "scales": _within(_unpack(rows["packed_scale"], _BITS["scale"]), chunks, "scale"),
            "quaternions": _unpack_rotations(rows["packed_rotation"]),
            "opacities": logits_of(np.arange(256) / 255)[rows["packed_color"] & 255],
            "colors": coefficients_of(rgb),
        }
    count = count_rest(harmonics, name) if harmonics else 0
    if harmonics and len(found["sh"]) != len(rows):
        raise damaged(".ply", name, f"{len(found['sh'])} rows of harmonics for {len(rows)} Gaussians")
    rest = _read_harmonics(found["sh"], count, name) if harmonics else np.zeros((len(rows), 0, 3), np.float32)
    return splats_of(tensors | {"harmonics": rest})


def write_compressed_ply(splats: Splats, *, lossy: bool = False) -> bytes:
    """A compressed .ply, every field rounded to the nearest that can be stored; never truncated.

    The Gaussians are stored in Morton order, so that those of a chunk lie together: row i of the file is row
    ``morton_order(splats.means)[i]`` of the scene. Each field is off by at most half a step: of positions, scales and
    colours (max - min) / 2047 (1023 along y) or / 255 of its chunk, of alpha 1 / 255, of a quaternion's three smaller
    components 1 / 1023 of the square root of 2, of harmonics 1 / 32 (outside -3.96 to 3.96 by a whole one, and
    clamped to -4 to 4). Scales are clamped to -20 to 20.

    Args:
        lossy: leave out what the format has no place for: extra numbers, harmonics above degree 3.

    Raises:
        InputError: numbers that are not finite, quaternions of length 0, or without ``lossy`` something to leave out.
    """
    refuse_loss(splats, "a compressed .ply", degree=3, lossy=lossy)
    splats = splats.of_degree(min(splats.degree, 3)).take(morton_order(splats.means)).to(torch.float32)
    refuse_bad(splats, "a compressed .ply")
    arrays = {field: values.detach().cpu().numpy() for field, values in splats.tensors().items()}
    chunks = np.zeros(-(-len(splats) // _CHUNK), [(title, "<f4") for titles in _BOUNDS.values() for title in titles])
    rows = np.zeros(len(splats), [(title, "<u4") for title in _WORDS])
    units = {
        "position": _normalise(arrays["means"], chunks, "position"),
        "scale": _normalise(arrays["scales"].clip(LEAST_SCALE, -LEAST_SCALE), chunks, "scale"),
        "color": np.column_stack(
            [_normalise(rgb_of(arrays["colors"]), chunks, "color"), alphas_of(arrays["opacities"])]
        ),
    }
    for field, values in units.items():
        rows[f"packed_{field}"] = _pack(values, _BITS[field])
    rows["packed_rotation"] = _pack_rotations(splats.quaternions.detach().cpu())
    rest = _harmonic_rows(arrays["harmonics"])
    elements = [("chunk", chunks), ("vertex", rows), *([("sh", rest)] if rest.dtype.names else [])]
    return b"".join([header_bytes(elements), *(table.tobytes() for _, table in elements)])


def _check(chunks: np.ndarray, rows: np.ndarray, name: str) -> None:
    """Refuse tables that are not those of the format; no property of another type could be taken for one."""
    colored = "min_r" in (chunks.dtype.names or ())
    needed = [(title, "f") for field, titles in _BOUNDS.items() if colored or field != "color" for title in titles]
    for table, titles in ((chunks, needed), (rows, [(title, "u") for title in _WORDS])):
        for title, kind in titles:
            found = table.dtype.fields and table.dtype.fields.get(title)
            if not found or found[0].kind != kind or found[0].itemsize != 4:
                raise damaged(".ply", name, f"a compressed scene without {title} of its type")
    if len(chunks) * _CHUNK < len(rows):
        raise damaged(".ply", name, f"{len(chunks)} chunks, where {-(-len(rows) // _CHUNK)} are needed")


def _unpack(words: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """Numbers in 0 to 1, float32 [n, parts], the highest bits first."""
    found = np.empty((len(words), len(bits)), np.float32)
    shift = sum(bits)
    for column, width in enumerate(bits):
        shift -= width
        most = (1 << width) - 1
        found[:, column] = (words >> np.uint32(shift)) & np.uint32(most)
        found[:, column] /= most
    return found


def _pack(values: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """The other way, rounded: uint32 [n] of numbers in 0 to 1."""
    words = np.zeros(len(values), np.uint32)
    for column, width in enumerate(bits):
        most = (1 << width) - 1
        words = (words << np.uint32(width)) | np.rint(values[:, column].clip(0, 1) * most).astype(np.uint32)
    return words


def _bounds(chunks: np.ndarray, field: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ones of each Gaussian, [n, 3]."""
    table = np.column_stack([chunks[title] for title in _BOUNDS[field]]).astype(np.float32)
    each = np.repeat(table, _CHUNK, 0)[:count]
    return each[:, :3], each[:, 3:]


def _within(units: np.ndarray, chunks: np.ndarray, field: str) -> np.ndarray:
    low, high = _bounds(chunks, field, len(units))
    return np.asarray(low * (1 - units) + high * units)  # exact at both ends


def _normalise(values: np.ndarray, chunks: np.ndarray, field: str) -> np.ndarray:
    """Numbers in 0 to 1, float64 [n, 3], of their place within the bounds, which are written into the chunks."""
    starts = np.arange(0, len(values), _CHUNK)
    for end, reduce in (("min", np.minimum), ("max", np.maximum)):
        found = reduce.reduceat(values, starts).astype(np.float32) if len(values) else np.zeros((0, 3))
        for column in range(3):
            chunks[_BOUNDS[field][column + 3 * (end == "max")]] = found[:, column]
    low, high = (each.astype(np.float64) for each in _bounds(chunks, field, len(values)))
    return np.asarray((values - low) / np.where(high > low, high - low, 1))


def _unpack_rotations(words: np.ndarray) -> np.ndarray:
    largest, *others = (
        torch.from_numpy(((words >> np.uint32(shift)) & np.uint32(1023)).astype(np.int64)) for shift in (30, 20, 10, 0)
    )
    return np.asarray(unpack(largest, torch.stack(others, 1), 10).numpy())


def _pack_rotations(quaternions: Tensor) -> np.ndarray:
    largest, levels = pack(quaternions, 10)
    words = (largest << 30) | (levels << torch.tensor([20, 10, 0])).sum(1)
    return np.asarray(words.numpy().astype(np.uint32))


def _read_harmonics(table: np.ndarray, count: int, name: str) -> np.ndarray:
    levels = np.arange(256, dtype=np.float32) / 32 + np.float32(1 / 64 - 4)
    levels[[0, 255]] = -4, 4
    found = np.empty((len(table), 3 * count), np.float32)
    titles = rest_names(count)
    if any(table.dtype[title] != np.uint8 for title in titles):
        raise damaged(".ply", name, "harmonics that are no bytes")
    for part in blocks(len(table)):
        for column, title in enumerate(titles):
            found[part, column] = levels[table[title][part]]
    return found.reshape(len(table), count, 3)


def _harmonic_rows(harmonics: np.ndarray) -> np.ndarray:
    """Bytes by channel. Cut off, for the reader's levels lie half a step above."""
    count = harmonics.shape[1]
    codes = (harmonics * np.float32(32) + np.float32(128)).clip(0, 255).astype(np.uint8)
    by_channel = np.ascontiguousarray(codes.transpose(0, 2, 1)).reshape(len(harmonics), 3 * count)
    titles = [f"f_rest_{index}" for index in range(3 * count)]
    return by_channel.view([(title, "u1") for title in titles])[:, 0] if count else np.zeros(len(harmonics), [])
