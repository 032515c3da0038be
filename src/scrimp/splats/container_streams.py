"""The streams of our container: whole numbers of Gaussians in Morton order, each stream coded by itself."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats import codec, codec_harmonics
from scrimp.splats.codec import Grid, Settings
from scrimp.splats.entropy import decode_fields, decode_points, decode_rotated, encode_fields, encode_points
from scrimp.splats.scene import COUNTS, Splats

NAMES = ("levels", "logs", "rotations", "points", "colors", "basis", "counts", "harmonics", "extra")
_DTYPES = {torch.float32: "f4", torch.float64: "f8", torch.int32: "i4", torch.uint8: "u1"}
_MOST_EXTRA = 64


@dataclass(frozen=True)
class Shape:
    """What the header says beside the settings."""

    count: int
    degree: int
    grid: Grid
    antialiased: bool


def write_streams(splats: Splats, settings: Settings, visible: Tensor) -> tuple[dict[str, bytes], Shape, Tensor]:
    """Encode canonical Gaussians, given in any order.

    Args:
        visible: [n] float64, how much errors of each show.

    Returns:
        The streams by name, what the header needs, and the order [n] that the Gaussians were put in.
    """
    levels = codec.levels_of(visible, settings)
    logs = codec.log_numbers(splats, levels, settings)
    octaves = codec.octaves_of(logs, levels, settings)
    exponents = codec.cell_exponents(octaves, levels, settings)
    grid = codec.grid_for(splats.means, exponents)
    drops = codec.drops_of(exponents, grid)
    points = codec.grid_points(splats.means, drops, grid)
    order = codec.point_order(points)
    levels, logs, octaves = levels[order], logs[order], octaves[order]
    streams = {
        "levels": _same(levels[:, None].int(), torch.zeros_like(levels), predicted=True),
        "logs": _encode_logs(logs, levels, settings),
        "points": encode_points(points[order], drops=drops[order], levels=grid.levels),
    }
    shifts = codec.rotation_shifts(octaves, levels, settings)
    turned = codec.rotation_numbers(splats.quaternions[order], shifts, settings)
    streams["rotations"] = _same(turned, shifts, predicted=False)
    shifts = settings.shifts(4, levels)
    streams["colors"] = _same(codec.color_numbers(splats.colors[order], shifts, settings), shifts, predicted=True)
    # Only their ratios count, and squares of tiny or huge ones would leave float32.
    weights = (visible[order] / visible.max().clamp_min(1e-300)).square() if len(visible) else visible
    streams |= _encode_harmonics(splats.harmonics.flatten(1), order, levels, (weights, settings))
    streams["extra"] = _encode_extra(splats.extra, order)
    return streams, Shape(len(splats), splats.degree, grid, splats.antialiased), order


def read_streams(streams: Mapping[str, bytes], settings: Settings, shape: Shape) -> Splats:
    """The Gaussians, in the order they are stored in.

    Raises:
        InputError: streams that are damaged.
    """
    n, width = shape.count, 3 * COUNTS[shape.degree]
    nothing = torch.zeros(n, 1, dtype=torch.uint8)
    levels = decode_fields(streams["levels"], shifts=nothing, predicted=[True])[:, 0]
    levels = levels.clamp(0, settings.levels - 1).to(torch.uint8)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        harmonics = pool.submit(_decode_harmonics, streams, levels, width, settings)
        shifts = settings.shifts(4, levels)
        colors = pool.submit(_decode_same, streams["colors"], shifts, predicted=True)
        logs = _decode_logs(streams["logs"], levels, settings)
        octaves = codec.octaves_of(logs, levels, settings)
        drops = codec.drops_of(codec.cell_exponents(octaves, levels, settings), shape.grid)
        points = pool.submit(decode_points, streams["points"], drops=drops, levels=shape.grid.levels)
        turns = codec.rotation_shifts(octaves, levels, settings)
        turned = _decode_same(streams["rotations"], turns, predicted=False)
        return Splats(
            means=codec.means_from(points.result(), drops, shape.grid),
            quaternions=codec.quaternions_from(turned, turns, settings),
            scales=codec.scales_from(octaves),
            opacities=codec.opacities_from(octaves),
            colors=codec.colors_from(colors.result(), shifts, settings),
            harmonics=harmonics.result().reshape(n, width // 3, 3),
            extra=_decode_extra(streams["extra"], n),
            antialiased=shape.antialiased,
        )


def _same(numbers: Tensor, shifts: Tensor, *, predicted: bool) -> bytes:
    """Columns that share their shifts [n]."""
    width = numbers.shape[1]
    return encode_fields(numbers, shifts=shifts[:, None], predicted=[predicted] * width)


def _decode_same(data: bytes, shifts: Tensor, *, predicted: bool, width: int = 3) -> Tensor:
    return decode_fields(data, shifts=shifts[:, None], predicted=[predicted] * width)


def _log_shifts(levels: Tensor, settings: Settings) -> Tensor:
    return torch.stack([settings.shifts(0, levels), *[settings.shifts(1, levels)] * 3], 1)


def _encode_logs(logs: Tensor, levels: Tensor, settings: Settings) -> bytes:
    return encode_fields(logs, shifts=_log_shifts(levels, settings), predicted=[True] * 4)


def _decode_logs(data: bytes, levels: Tensor, settings: Settings) -> Tensor:
    return decode_fields(data, shifts=_log_shifts(levels, settings), predicted=[True] * 4)


def _encode_harmonics(flat: Tensor, order: Tensor, levels: Tensor, rest: tuple[Tensor, Settings]) -> dict[str, bytes]:
    weights, settings = rest
    if not flat.numel() or (settings.harmonics == 0 and settings.palette == 0):
        return {"basis": b"", "counts": b"", "harmonics": b""}
    if settings.palette:
        return _encode_palette(flat[order].float(), levels, weights, settings)
    shifts = settings.shifts(5, levels)
    axes = codec_harmonics.principal_axes(flat, weights, order=order)
    numbers = codec_harmonics.rotated_numbers(flat, axes, settings.harmonics, shifts, order=order)
    counts = codec_harmonics.used_counts(numbers)
    used = int(counts.max())
    kinds = [False] * numbers.shape[1]
    return {
        "basis": _encode_axes(axes[:, :used]),
        "counts": _same(counts[:, None].int(), levels, predicted=False),
        # Columns beyond those counted are never looked at.
        "harmonics": encode_fields(numbers, shifts=shifts[:, None], predicted=kinds, counts=counts) if used else b"",
    }


def _encode_axes(axes: Tensor) -> bytes:
    numbers = (axes.float() / codec_harmonics.AXIS_STEP).round().int().reshape(-1, 1)
    return struct.pack("<B", axes.shape[1]) + _same(
        numbers, torch.zeros(len(numbers), dtype=torch.uint8), predicted=False
    )


def _decode_axes(basis: bytes, width: int) -> Tensor:
    """[width, used] float32."""
    used = basis[0] if basis else width + 1
    if used > width:
        raise InputError(f"at most {width} axes of the harmonics", f"{used}", "copy the file again")
    zeros = torch.zeros(width * used, dtype=torch.uint8)
    numbers = _decode_same(basis[1:], zeros, predicted=False, width=1)
    return (numbers.float() * codec_harmonics.AXIS_STEP).reshape(width, used)


def _decode_harmonics(streams: Mapping[str, bytes], levels: Tensor, width: int, settings: Settings) -> Tensor:
    n = len(levels)
    if not width or not streams["counts"]:
        return torch.zeros(n, width)
    if settings.palette:
        return _decode_palette(streams, levels, width)
    axes = _decode_axes(streams["basis"], width)
    used = axes.shape[1]
    if not used:
        return torch.zeros(n, width)
    counts = _decode_same(streams["counts"], levels, predicted=False, width=1)[:, 0].clamp(0, used).to(torch.uint8)
    shifts = settings.shifts(5, levels)
    return decode_rotated(streams["harmonics"], shifts=shifts, counts=counts, axes=axes, step=settings.harmonics)


def _encode_palette(flat: Tensor, levels: Tensor, weights: Tensor, settings: Settings) -> dict[str, bytes]:
    threshold = settings.harmonics
    centres, labels = codec_harmonics.palette_of(flat, weights.float(), settings.palette, threshold=threshold)
    step = max(float(centres.abs().max()) / 127, 1e-30) if len(centres) else 1.0
    numbers = (centres / step).round().int()
    zeros = torch.zeros(len(centres), dtype=torch.uint8)
    return {
        "basis": struct.pack("<If", len(centres), step) + _same(numbers, zeros, predicted=False),
        "counts": _same(labels[:, None], levels, predicted=False),
        "harmonics": b"",
    }


def _decode_palette(streams: Mapping[str, bytes], levels: Tensor, width: int) -> Tensor:
    basis = streams["basis"]
    size, step = struct.unpack("<If", basis[:8]) if len(basis) >= 8 else (1 << 31, 0.0)
    if size > min(65536, max(1, len(levels))) or not 0 < step < 1e30:
        raise InputError("a palette of the harmonics", f"{len(basis)} bytes that say {size}", "copy the file again")
    zeros = torch.zeros(size, dtype=torch.uint8)
    numbers = _decode_same(basis[8:], zeros, predicted=False, width=width)
    palette = torch.cat([torch.zeros(1, width), numbers.float() * step])
    labels = _decode_same(streams["counts"], levels, predicted=False, width=1)[:, 0]
    return palette[labels.clamp(0, size).long()]


def _encode_extra(extra: Mapping[str, Tensor], order: Tensor) -> bytes:
    """Each: length of the name, the name, type, length, and bytes of equal rank side by side, deflated."""
    parts = []
    for name, values in extra.items():
        kind, label = _DTYPES.get(values.dtype), name.encode()
        if kind is None or len(label) > 255 or len(extra) > _MOST_EXTRA:
            got = f"{name[:40]} of {values.dtype} out of {len(extra)}"
            raise InputError(f"at most {_MOST_EXTRA} extra fields of {', '.join(_DTYPES.values())}", got, "drop it")
        raw = values.cpu()[order].numpy().astype(f"<{kind}")
        packed = zlib.compress(raw.view(np.uint8).reshape(len(raw), raw.itemsize).T.tobytes(), 6)
        parts.append(struct.pack("<B", len(label)) + label + kind.encode() + struct.pack("<I", len(packed)) + packed)
    return b"".join(parts)


def _decode_extra(data: bytes, count: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        while data:
            length = data[0]
            name, kind = data[1 : 1 + length].decode(), data[1 + length : 3 + length].decode()
            (size,) = struct.unpack_from("<I", data, 3 + length)
            packed, data = data[7 + length : 7 + length + size], data[7 + length + size :]
            found[name] = _inflated(packed, kind, count)
            if len(found) > _MOST_EXTRA:
                raise ValueError("too many")
    except (IndexError, ValueError, struct.error, zlib.error) as error:
        raise InputError("extra fields of each Gaussian", f"damaged ones ({error})", "copy the file again") from error
    return found


def _inflated(packed: bytes, kind: str, count: int) -> Tensor:
    if kind not in _DTYPES.values():
        raise ValueError(f"type {kind}")
    width = int(kind[1])
    engine = zlib.decompressobj()
    raw = engine.decompress(packed, count * width + 1)
    if len(raw) != count * width:
        raise ValueError(f"{len(raw)} bytes")
    columns = np.frombuffer(raw, np.uint8).reshape(width, count)
    return torch.from_numpy(np.ascontiguousarray(columns.T).view(f"<{kind}").reshape(count).astype(kind))
