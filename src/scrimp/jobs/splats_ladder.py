"""Formats as ladders: from their coarsest encoding to the finest, and which rung to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.report import units
from scrimp.splats import codec, container
from scrimp.splats.canonical import canonical
from scrimp.splats.codec import Settings
from scrimp.splats.compressed_ply import read_compressed_ply, write_compressed_ply
from scrimp.splats.morton import morton_order
from scrimp.splats.ply import read_ply, write_ply
from scrimp.splats.rate import COARSEST, FINEST, QUALITIES, settings_at
from scrimp.splats.scene import Splats
from scrimp.splats.sog import read_sog, write_sog
from scrimp.splats.splat_file import read_splat, write_splat
from scrimp.splats.spz import read_spz, write_spz

_STEPS = 16  # of the container's rungs: some 1.5 % of the bytes each
_MOST_ENTRIES = 1 << 16
_SHARED = {"small": (256, 1024), "medium": (64, 4096), "high": (16, 16384)}
"""Of a palette: Gaussians to an entry, and most entries."""


@dataclass(frozen=True)
class Ladder:
    """One format of one scene.

    Attributes:
        encode: the bytes of a rung, from 0, the coarsest.
        decode: a scene of the bytes.
        matched: of a rung, the scene's Gaussians in the order and form in which `decode` gives them back.
        told: what each rung is, in words; as many as there are rungs.
        named: rungs by quality.
    """

    encode: Callable[[int], bytes]
    decode: Callable[[bytes], Splats]
    matched: Callable[[int], Splats]
    told: tuple[str, ...]
    named: Mapping[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "high": 0})


def ladder_of(splats: Splats, format: str, *, seed: int = 0, spz_version: int = 3) -> Ladder:
    """The ladder of a format.

    Args:
        splats: float32, on the CPU; what the format has no place for is left out.
        seed: of the palette of a .sog.
    """
    if format == "sog":
        return _sog(splats, seed)
    if format == "spz":
        return _spz(splats, spz_version)
    if format == "sgs":
        return _sgs(splats)
    order = morton_order(splats.means) if format == "compressed.ply" else torch.arange(len(splats))
    plain: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Splats]]] = {
        "compressed.ply": (
            lambda: write_compressed_ply(splats, lossy=True),
            lambda data: read_compressed_ply(data, ""),
        ),
        "splat": (lambda: write_splat(splats, lossy=True), lambda data: read_splat(data, "")),
        "ply": (lambda: write_ply(splats), lambda data: read_ply(data, "")),
    }
    write, read = plain[format]
    return Ladder(lambda rung: write(), read, lambda rung: splats.take(order), (format,))


def within(sizes: Callable[[int], int], rungs: int, most: int) -> int:
    """The finest rung of at most so many bytes.

    Raises:
        InputError: not even the coarsest.
    """
    found = _last(lambda rung: sizes(rung) <= most, rungs)
    if found < 0:
        least = units.count(sizes(0))
        raise InputError(
            f"a --size of at least {least} bytes", f"{units.count(most)}", "allow more, or try --format sgs"
        )
    return found


def reaching(scores: Callable[[int], float], rungs: int, least: float) -> int:
    """The coarsest rung of at least so many dB.

    Raises:
        InputError: not even the finest.
    """
    found = _last(lambda rung: scores(rung) < least, rungs) + 1
    if found == rungs:
        best = scores(rungs - 1)
        raise InputError(f"a --psnr of at most {best:.2f} dB, the finest there is", f"{least:g}", "ask for less")
    return found


def _last(holds: Callable[[int], bool], rungs: int) -> int:
    """The last rung that holds, -1 for none, where those that hold come first."""
    low, high = -1, rungs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _sog(splats: Splats, seed: int) -> Ladder:
    """Palettes of more and more entries, half an octave apart; below them, no harmonics."""
    scene = splats.of_degree(min(3, splats.degree))
    order = morton_order(splats.means)
    sizes = _palettes(len(scene)) if scene.degree else []

    def encode(rung: int) -> bytes:
        if rung == 0:
            return write_sog(scene.of_degree(0), lossy=True)
        return write_sog(scene, palette_size=sizes[rung - 1], seed=seed, lossy=True)

    told = ("no harmonics", *(f"{size} harmonics in the palette" for size in sizes))
    named = dict.fromkeys(_SHARED, 0)
    if sizes:
        wanted = {name: min(most, max(64, len(scene) // shared)) for name, (shared, most) in _SHARED.items()}
        near = {name: min(range(len(sizes)), key=lambda k: abs(sizes[k] - size)) for name, size in wanted.items()}
        named = {name: place + 1 for name, place in near.items()}
    return Ladder(encode, read_sog, lambda rung: canonical(splats.take(order)), told, named)


def _palettes(count: int) -> list[int]:
    most = min(_MOST_ENTRIES, max(1, count))
    return sorted({min(most, round(2 ** (half / 2))) for half in range(8, 33)})


def _spz(splats: Splats, version: int) -> Ladder:
    """More and more bits of the harmonics; below them, no harmonics."""
    order = morton_order(splats.means)
    bits = [(min(8, most + 1), most) for most in range(1, 9)] if splats.degree else []

    def encode(rung: int) -> bytes:
        if rung == 0:
            return write_spz(splats.of_degree(0), version=version, lossy=True)
        return write_spz(splats, version=version, sh_bits=bits[rung - 1], lossy=True)

    told = ("no harmonics", *(f"harmonics of {low} and {high} bits" for low, high in bits))
    named = {"small": min(3, len(bits)), "medium": min(4, len(bits)), "high": len(bits)}
    return Ladder(encode, lambda data: read_spz(data, ""), lambda rung: splats.take(order), told, named)


def _sgs(splats: Splats) -> Ladder:
    """The container's ladder of `scrimp.splats.rate`. Pruning is the caller's."""
    prepared = container.prepare(splats)
    rungs = [COARSEST + step / _STEPS for step in range(round((FINEST - COARSEST) * _STEPS) + 1)]

    def matched(rung: int) -> Splats:
        return prepared.splats.take(_stored_order(prepared, settings_at(rungs[rung])))

    return Ladder(
        lambda rung: container.encode_prepared(prepared, settings_at(rungs[rung])),
        container.decode,
        matched,
        tuple(f"rung {rung:g}" for rung in rungs),
        {name: round((rung - COARSEST) * _STEPS) for name, rung in QUALITIES.items()},
    )


def _stored_order(prepared: container.Prepared, settings: Settings) -> Tensor:
    """In which the container stores Gaussians: that of their rounded positions."""
    levels = codec.levels_of(prepared.visible, settings)
    octaves = codec.octaves_of(codec.log_numbers(prepared.splats, levels, settings), levels, settings)
    exponents = codec.cell_exponents(octaves, levels, settings)
    grid = codec.grid_for(prepared.splats.means, exponents)
    drops = codec.drops_of(exponents, grid)
    return codec.point_order(codec.grid_points(prepared.splats.means, drops, grid))
