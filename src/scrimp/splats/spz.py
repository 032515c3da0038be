""".spz of Niantic, versions 2 to 4, as github.com/nianticlabs/spz reads and writes it.

A Gaussian takes 19 or 20 bytes and 3 for each coefficient of the harmonics before compression: positions in fixed
point of 24 bits, logarithms of scales in steps of 1 / 16 from -10 to 5.94, opacities in steps of 1 / 255, colours in
steps of 0.026 from -3.33 to 3.33, harmonics from -1 to 0.99 in as many bits as are asked for, rotations in the
smallest-three form of 10 bits (version 2: x, y and z in 8 bits). What lies outside these ranges is written as their
end; positions outside are refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.checks import refuse_bad, refuse_loss
from scrimp.splats.levels import opacity_levels, opacity_logits
from scrimp.splats.morton import morton_order
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.smallest_three import pack_signed, unpack_signed
from scrimp.splats.spz_streams import AXES, SpzStreams, pack_spz, unpack_spz

_OURS = "RDF"
_COLOR_STEP = 1 / (0.15 * 255)
_MOST_FIXED = 2**23 - 1
_MOST_BITS, _USUAL_BITS = 24, 12
_PIECE = 1 << 16  # Gaussians
# Axes in which each coefficient of degree 1 to 4 is odd. The last is even in fact; the reference takes it for odd in y,
# and a file of degree 4 comes from nowhere else.
_PARITY = ("y", "z", "x", "xy", "yz", "", "xz", "", "y", "xyz", "y", "z", "x", "z", "x",
           "xy", "yz", "xy", "yz", "", "xz", "", "xz", "y")  # fmt: skip


def read_spz(data: bytes | memoryview, name: str, *, axes: str = _OURS) -> Splats:
    """Read a .spz file.

    Args:
        data: the whole file.
        name: of the file, for errors.
        axes: where x, y and z point in a file that does not say. Programs of today (splat-transform from version 3 on,
            gsply, gaussforge) write the coordinates of a 3DGS .ply as they are, "RDF"; some older ones, and what
            Niantic's own reader assumes, have "RUB".

    Returns:
        Float32, with the axes of 3DGS (right, down, front).

    Raises:
        InputError: damaged, truncated, or of a kind that is not read; see `unpack_spz`.
        MissingExtraError: version 4 without a Zstandard library.
    """
    spz = unpack_spz(data, name)
    raw = {title: np.frombuffer(stream, np.uint8) for title, stream in spz.streams.items()}
    count, bands = spz.count, COUNTS[spz.degree]
    wide = np.zeros((count, 3, 4), np.uint8)
    wide[..., 1:] = raw["positions"].reshape(count, 3, 3)
    fixed = wide.view("<i4")[..., 0] >> 8  # the sign fills the high bits
    stored = Splats(
        means=torch.from_numpy(fixed.astype(np.float32)) * 2.0**-spz.fractional_bits,
        quaternions=_rotations(raw["rotations"], spz),
        scales=_floats(raw["scales"], count, 3) / 16 - 10,
        opacities=opacity_logits(torch.from_numpy(raw["alphas"].copy())),
        colors=(_floats(raw["colors"], count, 3) - 127.5) * _COLOR_STEP,
        harmonics=_floats(raw["harmonics"], count, bands, 3).sub_(128).mul_(1 / 128),
        antialiased=spz.antialiased,
    )
    return flip_axes(stored, spz.axes or axes, _OURS)


@torch.no_grad()
def write_spz(
    splats: Splats,
    *,
    version: int = 3,
    sh_bits: tuple[int, int] = (5, 4),
    fractional_bits: int | None = None,
    axes: str | None = None,
    lossy: bool = False,
) -> bytes:
    """A .spz file, every number rounded to the nearest that it can hold.

    The Gaussians are in the order of `morton_order`, which makes it some 7 % smaller.

    Args:
        splats: with the axes of 3DGS (right, down, front).
        version: 2, 3 or 4. Fewest programs read 4.
        sh_bits: of harmonics of degree 1, and above; 1 to 8.
        fractional_bits: of positions: their step is 2**-bits. By default 12, as the reference writes, or as many more
            as make the step half of the width of small Gaussians; fewer where the scene's extent leaves no room.
        axes: to store, of `AXES`, and to name in an extension, which older readers ignore. By default the coordinates
            of a 3DGS .ply as they are, unnamed, as other programs of today expect them.
        lossy: leave out extra numbers.

    Raises:
        InputError: numbers that are not finite, extra ones unless ``lossy``, positions too large, or an option out of
            its range.
        MissingExtraError: version 4 without a Zstandard library.
    """
    if version not in (2, 3, 4) or not all(1 <= bits <= 8 for bits in sh_bits) or axes not in (None, *AXES):
        got = f"version {version}, sh_bits {sh_bits}, axes {axes}"
        raise InputError(f"version 2, 3 or 4, sh_bits of 1 to 8, axes out of: {', '.join(AXES)}", got, "correct it")
    refuse_bad(splats, "a .spz")
    refuse_loss(splats, "a .spz", degree=4, lossy=lossy)
    plain = replace(splats, extra={}).to("cpu", torch.float32)
    scene = flip_axes(plain.take(morton_order(plain.means)), _OURS, axes or _OURS)
    bits = _fractional_bits(scene) if fractional_bits is None else fractional_bits
    streams = {
        "positions": _fixed_point(scene.means, bits),
        "alphas": opacity_levels(scene.opacities),
        "colors": _bytes(scene.colors / _COLOR_STEP + 127.5),
        "scales": _bytes((scene.scales + 10) * 16),
        "rotations": _pack_rotations(scene.quaternions, version),
        "harmonics": _pack_harmonics(scene.harmonics, sh_bits),
    }
    content = {name: np.asarray(values).tobytes() for name, values in streams.items()}
    return pack_spz(SpzStreams(version, len(scene), scene.degree, bits, axes, scene.antialiased, content))


def flip_axes(splats: Splats, have: str, want: str) -> Splats:
    """The same scene with some of its axes reversed: positions, rotations and harmonics.

    Args:
        have, want: where x, y and z point, of `AXES`.
    """
    if have == want:
        return splats
    signs = {axis: 1.0 if a == b else -1.0 for axis, a, b in zip("xyz", have, want, strict=True)}
    x, y, z = signs.values()
    parity = [math.prod(signs[axis] for axis in odd) for odd in _PARITY[: splats.harmonics.shape[1]]]
    return replace(
        splats,
        means=splats.means * splats.means.new_tensor([x, y, z]),
        quaternions=splats.quaternions * splats.quaternions.new_tensor([1, y * z, x * z, x * y]),
        harmonics=splats.harmonics * splats.harmonics.new_tensor(parity)[:, None],
    )


def _fractional_bits(scene: Splats) -> int:
    """Enough for the 5 % of Gaussians that are smallest, by the middle one of their widths. More only cost bytes."""
    most = float(scene.means.abs().max()) if len(scene) else 0.0
    room = math.floor(math.log2(_MOST_FIXED / most)) if most else _MOST_BITS
    if not len(scene):
        return _USUAL_BITS
    width = float(scene.scales.median(1).values.kthvalue(1 + len(scene) // 20).values)
    return max(0, min(_MOST_BITS, room, max(_USUAL_BITS, math.ceil(1 - width / math.log(2)))))


def _fixed_point(means: Tensor, bits: int) -> np.ndarray:
    if not 0 <= bits <= _MOST_BITS:
        raise InputError(f"fractional_bits of 0 to {_MOST_BITS}", f"{bits}", "leave it out, or pass one of these")
    fixed = (means.double() * 2**bits).round()
    if len(means) and float(fixed.abs().max()) > _MOST_FIXED:
        most = float(means.abs().max())
        remedy = "rescale the scene" if bits == 0 else "pass fewer fractional_bits, or none"
        raise InputError(f"positions up to {_MOST_FIXED / 2**bits:g} for a .spz file", f"{most:g}", remedy)
    return np.ascontiguousarray(fixed.int().numpy().astype("<i4")[..., None].view(np.uint8)[..., :3])


def _pack_rotations(quaternions: Tensor, version: int) -> np.ndarray:
    if version == 2:
        unit = quaternions / quaternions.norm(dim=1, keepdim=True)
        three = torch.where(unit[:, :1] < 0, -unit, unit)[:, 1:]
        return _bytes(three * 127.5 + 127.5).numpy()
    largest, levels = pack_signed(quaternions[:, [1, 2, 3, 0]], 10)
    word = (largest << 30) | (levels[:, 0] << 20) | (levels[:, 1] << 10) | levels[:, 2]
    return word.numpy().astype("<u4")


def _rotations(raw: np.ndarray, spz: SpzStreams) -> Tensor:
    """[n, 4], w x y z."""
    if spz.version == 2:
        three = _floats(raw, spz.count, 3) / 127.5 - 1
        real = (1 - three.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([real, three], 1)
    word = torch.from_numpy(raw.view("<u4").astype(np.int64))
    levels = torch.stack([(word >> shift) & 1023 for shift in (20, 10, 0)], 1)
    return unpack_signed(word >> 30, levels, 10)[:, [3, 0, 1, 2]]


def _pack_harmonics(harmonics: Tensor, sh_bits: tuple[int, int]) -> np.ndarray:
    """Slots of 8 bits of which only the highest are used: 0 is always among the numbers they stand for."""
    used = [sh_bits[0] if k < 3 else sh_bits[1] for k in range(harmonics.shape[1])]
    step = harmonics.new_tensor([2.0 ** (8 - bits) for bits in used])[:, None]
    # By pieces: whole, the numbers in between would take several times the scene.
    pieces = [_bytes((piece * 128 / step).round() * step + 128) for piece in harmonics.split(_PIECE)]
    return torch.cat(pieces).numpy()


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _floats(raw: np.ndarray, *shape: int) -> Tensor:
    return torch.from_numpy(raw.astype(np.float32)).reshape(shape)
