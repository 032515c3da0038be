"""From Gaussians to whole numbers and back, each Gaussian as precisely as it is seen.

An error in a Gaussian shows in pictures in proportion to its alpha and to the root of the area that it covers. Each has
therefore a level: its steps are ``2 ** level`` times the finest, so that the errors of all show alike (reverse
water-filling, Cover and Thomas, chapter 10). Steps of a position are measured by the Gaussian's own size, those of a
rotation by how unequal its axes are. What the decoder has to derive it derives from whole numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats.entropy import LEVELS, MOST_SHIFT
from scrimp.splats.entropy import point_order as point_order
from scrimp.splats.scene import Splats

OCTAVE = 256
"""Steps of logarithms are multiples of this part of an octave."""
GRID_LEVELS = LEVELS
_DARKEST = 16 * OCTAVE  # alphas below 2**-16 become that
_MOST_ALPHA = 1 - 2.0**-12
_REACH = 200 * OCTAVE  # scales beyond 2**+-200 become that
_YUV = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
_YUV = _YUV / _YUV.norm(dim=1, keepdim=True)
_FRAME: list[float] = _YUV.flatten().tolist()
COLOR_GAIN = float(_YUV.abs().sum(0).max())
"""Of an error in all three of brightness and differences, that of one colour."""


@dataclass(frozen=True)
class Settings:
    """How finely each field is stored at level 0.

    Attributes:
        opacity, scale: steps of the logarithms of alpha and of the scales, in octaves / `OCTAVE`, 1 to 4096.
        position: binary logarithm, in octaves / `OCTAVE`, of the largest cell as a part of the middle scale.
        rotation: step of each component of the quaternion but the largest, where axes differ by 8 times.
        color: step of the coefficients of degree 0, in brightness, colour and hue.
        harmonics: step of the rotated coefficients above; 0 leaves them out.
        palette: entries of a palette in the place of rotated harmonics; 0 for none.
        levels: of precision, 1 to 16; 1 treats all Gaussians alike.
        caps: highest level at which the steps of opacity, scale, position, rotation, color, harmonics still grow.
        thinnest: octaves from the longest axis below which another is raised.
        adapt: power of the visibility in inverse proportion to which steps grow; the decoder need not know it.
    """

    opacity: int = 12
    scale: int = 13
    position: int = -1040
    rotation: float = 0.006
    color: float = 0.034
    harmonics: float = 0.025
    palette: int = 0
    levels: int = 14
    caps: tuple[int, int, int, int, int, int] = (5, 5, 8, 7, 7, 8)
    thinnest: int = 8
    adapt: float = 0.84

    def __post_init__(self) -> None:
        good = 1 <= self.opacity <= 4096 and 1 <= self.scale <= 4096 and -8192 <= self.position <= 0
        good = good and 1e-6 <= self.rotation <= 1 and 1 <= self.levels <= MOST_SHIFT + 1
        good = good and 0 < self.color < math.inf and 0 <= self.harmonics < math.inf and 0 <= self.palette <= 65536
        good = good and len(self.caps) == 6 and all(0 <= cap <= MOST_SHIFT for cap in self.caps)
        if not good or not 1 <= self.thinnest <= 64 or not 0 <= self.adapt <= 2:
            raise InputError("settings in the ranges that Settings lists", f"{self}", "correct them")

    def shifts(self, field: int, levels: Tensor) -> Tensor:
        """Binary logarithms of the steps of a field, in steps of level 0: [n] uint8."""
        return levels.clamp(max=self.caps[field])


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of ``2 ** exponent`` from an origin on, ``2 ** levels`` along each axis."""

    origin: tuple[float, float, float]
    exponent: int
    levels: int


def visibility(splats: Splats) -> Tensor:
    """[n] float64: alpha times the root of the area, as seen from nobody knows where.

    The root of the product of the two longest axes, over the distance from the median position to the power of 3 / 4;
    within the median distance nothing is taken to be nearer. From amid the scene what is farther shows as less in
    proportion, from outside it does not.
    """
    if not len(splats):
        return torch.zeros(0, dtype=torch.float64)
    middle = torch.stack([column.double().median() for column in splats.means.unbind(1)])
    longest = by_rows(lambda scales: scales.double().topk(2, dim=1).values.mean(1), splats.scales)
    away = by_rows(lambda means: (means.double() - middle).norm(dim=1), splats.means)
    distance = torch.maximum(away, away.median())
    distance = torch.where(distance > 0, distance, 1.0)
    return splats.opacities.double().sigmoid() * (longest - 0.75 * distance.log()).clamp(-300, 300).exp()


def levels_of(visible: Tensor, settings: Settings) -> Tensor:
    """[n] uint8: octaves, times ``adapt``, that a Gaussian is less visible than the top hundredth of them."""
    count = settings.levels
    if not len(visible) or count == 1:
        return torch.zeros(len(visible), dtype=torch.uint8)
    top = visible.kthvalue(max(1, math.ceil(0.99 * len(visible)))).values.clamp_min(1e-300)
    octaves = ((top / visible.clamp_min(1e-300)).log2() * settings.adapt).round()
    return octaves.clamp(0, count - 1).to(torch.uint8)


def log_numbers(splats: Splats, levels: Tensor, settings: Settings) -> Tensor:
    """[n, 4] int32 of canonical Gaussians: darkness -log2 alpha, longest scale, and the differences of the others."""

    def rows(opacities: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
        alpha = opacities.double().sigmoid().clamp(2.0**-_MOST_DARK, 1)
        darkness = _stepped(-alpha.log2() * OCTAVE, settings.opacity, settings.shifts(0, levels))
        octaves = (scales.double() / math.log(2) * OCTAVE).clamp(-_REACH, _REACH)
        octaves = torch.maximum(octaves, octaves[:, :1] - settings.thinnest * OCTAVE)
        sizes = _stepped(octaves, settings.scale, settings.shifts(1, levels)[:, None])
        return torch.stack([darkness, sizes[:, 0], *(sizes[:, :-1] - sizes[:, 1:]).unbind(1)], 1).to(torch.int32)

    return by_rows(rows, splats.opacities, splats.scales, levels)


_MOST_DARK = _DARKEST // OCTAVE


def octaves_of(logs: Tensor, levels: Tensor, settings: Settings) -> Tensor:
    """[n, 4] int32, in octaves / `OCTAVE`: darkness and the three scales, from `log_numbers`."""
    # Numbers of damaged files stay where they overflow nothing.
    module, limit = native.load(), 4 * _REACH
    if module is not None:
        logs, levels, found = logs.contiguous(), levels.contiguous(), torch.empty(logs.shape, dtype=torch.int32)
        steps = [settings.opacity, settings.scale, *settings.caps[:2]]
        module.range_octaves(logs.data_ptr(), found.data_ptr(), len(logs), levels.data_ptr(), steps, limit)
        return found
    wide = logs.long()
    sizes = wide[:, 1:2] - torch.cat([torch.zeros_like(wide[:, :1]), wide[:, 2:].cumsum(1)], 1)
    darkness = wide[:, 0] * settings.opacity << settings.shifts(0, levels).long()
    sizes = sizes * settings.scale << settings.shifts(1, levels).long()[:, None]
    return torch.cat([darkness[:, None], sizes], 1).clamp(-limit, limit).int()


def opacities_from(octaves: Tensor) -> Tensor:
    """Logits [n] float32; an alpha of 1, which has none, is read as a little less."""
    every = torch.arange(2 * _DARKEST + 1, dtype=torch.float64)
    alpha = torch.exp2(every / -OCTAVE).clamp(max=_MOST_ALPHA)
    return (alpha.log() - (-alpha).log1p()).float()[octaves[:, 0].clamp(0, 2 * _DARKEST)]


def scales_from(octaves: Tensor) -> Tensor:
    """[n, 3] float32."""
    return octaves[:, 1:].float() * (math.log(2) / OCTAVE)


def rotation_shifts(octaves: Tensor, levels: Tensor, settings: Settings) -> Tensor:
    """[n] uint8: binary logarithms of the steps of quaternions, in the finest steps of all.

    A turn by t moves the edge of a Gaussian whose axes differ by a factor r by some t (r - 1 / r) / 2.
    """
    unequal = octaves[:, 1] - octaves[:, 3]
    bounds = torch.tensor([OCTAVE // 8, OCTAVE // 4, OCTAVE // 2, OCTAVE, 2 * OCTAVE, 3 * OCTAVE])
    coarser = 6 - torch.bucketize(unequal, bounds, right=True, out_int32=True)
    return (coarser + settings.shifts(3, levels)).clamp(max=MOST_SHIFT).to(torch.uint8)


def rotation_numbers(quaternions: Tensor, shifts: Tensor, settings: Settings) -> Tensor:
    """[n, 3] int32: x, y and z of unit quaternions whose w is the largest component."""
    return by_rows(lambda q, s: _stepped(q[:, 1:].double() / settings.rotation, 1, s[:, None]), quaternions, shifts)


def quaternions_from(numbers: Tensor, shifts: Tensor, settings: Settings) -> Tensor:
    """Unit quaternions [n, 4] float32."""
    found = _restored("range_quaternions", numbers, shifts, settings.rotation, width=4)
    if found is not None:
        return found
    three = (numbers.long() << shifts.long()[:, None]).double() * settings.rotation
    rest = (1 - three.square().sum(1, keepdim=True)).clamp_min(0)
    whole = torch.cat([rest.sqrt(), three], 1)
    return (whole / whole.norm(dim=1, keepdim=True)).float()


def cell_exponents(octaves: Tensor, levels: Tensor, settings: Settings) -> Tensor:
    """[n] int32: binary logarithms of the cells that positions need."""
    return (octaves[:, 2] + settings.position >> 8) + settings.shifts(2, levels)


def grid_for(means: Tensor, exponents: Tensor) -> Grid:
    """The coarsest grid as fine as the finest cell needed, or as its `GRID_LEVELS` levels allow."""
    if not len(means):
        return Grid((0.0, 0.0, 0.0), 0, 0)
    low, high = (edge.double() for edge in torch.aminmax(means, dim=0))
    extent = float((high - low).max())
    finest = int(exponents.min())
    # One cell to spare: the last point may fall on an edge.
    room = math.ceil(math.log2(extent)) - GRID_LEVELS + 1 if extent > 0 else finest
    exponent = max(finest, room, -1000)
    cells = extent / 2.0**exponent
    levels = min(GRID_LEVELS, max(0, math.ceil(math.log2(cells + 1))))
    return Grid((float(low[0]), float(low[1]), float(low[2])), exponent, levels)


def drops_of(exponents: Tensor, grid: Grid) -> Tensor:
    """[n] uint8: digits that a position does without."""
    return (exponents - grid.exponent).clamp(0, grid.levels).to(torch.uint8)


def grid_points(means: Tensor, drops: Tensor, grid: Grid) -> Tensor:
    """[n, 3] int32, as `scrimp.splats.entropy.encode_points` wants them."""
    origin = torch.tensor(grid.origin, dtype=torch.float64)

    def rows(means: Tensor, drops: Tensor) -> Tensor:
        cells = ((means.double() - origin) * 2.0**-grid.exponent).floor().long().clamp(0, 2**grid.levels - 1)
        drop = drops.long()[:, None]
        return ((cells >> drop << drop) | torch.where(drop > 0, 1 << (drop - 1).clamp_min(0), 0)).int()

    return by_rows(rows, means, drops)


def means_from(points: Tensor, drops: Tensor, grid: Grid) -> Tensor:
    """[n, 3] float32: the middles of the cells."""
    found = _restored("range_means", points, drops, 2.0**grid.exponent, frame=[*grid.origin, *_FRAME[3:]])
    if found is not None:
        return found
    origin = torch.tensor(grid.origin, dtype=torch.float64)
    middle = points.double() + 0.5 * (drops == 0).double()[:, None]
    return (origin + middle * 2.0**grid.exponent).float()


def color_numbers(colors: Tensor, shifts: Tensor, settings: Settings) -> Tensor:
    """[n, 3] int32: brightness and two differences of colours, orthonormal."""
    return by_rows(lambda c, s: _stepped(c.double() @ _YUV.T / settings.color, 1, s[:, None]), colors, shifts)


def colors_from(numbers: Tensor, shifts: Tensor, settings: Settings) -> Tensor:
    """[n, 3] float32."""
    found = _restored("range_framed", numbers, shifts, settings.color)
    if found is not None:
        return found
    return ((numbers.long() << shifts.long()[:, None]).double() * settings.color @ _YUV).float()


def by_rows(change: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``change`` of all rows, a piece at a time: numbers in between, float64, need not be held of a whole scene."""
    pieces = zip(*(values.split(_ROWS) for values in rows), strict=True)
    return torch.cat([change(*piece) for piece in pieces]) if len(rows[0]) else change(*rows)


_ROWS = 1 << 15


def _restored(
    name: str, numbers: Tensor, shifts: Tensor, step: float, *, frame: list[float] = _FRAME, width: int = 3
) -> Tensor | None:
    """[n, width] float32 by the kernel of this name; None without the native library."""
    module = native.load()
    if module is None:
        return None
    numbers, shifts, found = numbers.contiguous(), shifts.contiguous(), torch.empty(len(numbers), width)
    getattr(module, name)(numbers.data_ptr(), found.data_ptr(), len(numbers), shifts.data_ptr(), step, frame)
    return found


def _stepped(values: Tensor, step: int, shifts: Tensor) -> Tensor:
    """Values in steps of ``step << shift``, rounded to the nearest: int32."""
    steps = (values / (step * torch.exp2(shifts.double()))).round()
    if steps.numel() and float(steps.abs().max()) >= 1 << 22:
        raise InputError("numbers below 4 million steps", f"{float(steps.abs().max()):.3g}", "take larger steps")
    return steps.to(torch.int32)
