"""Lenses that bend straight lines, and photographs straightened onto the pinhole camera that a renderer needs.

Points are in normalised coordinates, x / z and y / z in the camera's axes; pixels' centres lie at whole number + 1/2.
Two models: Brown-Conrady with a rational radial part (OpenCV, "Camera calibration and 3D reconstruction") and the
equidistant fisheye of Kannala and Brandt (2006), both with OpenCV's and COLMAP's coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera

_NEWTON_STEPS = 60
_CONVERGED = 1e-9  # of a distorted normalised coordinate: a millionth of a pixel
_WIDEST_ANGLE = math.pi / 2 - 1e-3  # a pinhole sees nothing further from its axis
_LEAST_FOCAL = 0.5  # of the lens's own: straightening a wide fisheye whole would leave its middle a blur
_LARGEST_SIDE = 10**6
_LARGEST_NUMBER = 1e12  # what products of two of still have roots
_EDGE_SAMPLES = 257


@dataclass(frozen=True)
class Lens:
    """What a photograph was taken through.

    Attributes:
        width, height: of the photograph, pixels.
        focal, centre: fx, fy and cx, cy, pixels.
        radial: k1, k2, ... of the even powers: of the radius, or of the angle for a fisheye.
        divisor: k4, k5, k6 of the rational model, which divides by 1 + k4 r^2 + ...
        tangential: p1, p2.
        fisheye: equidistant: the distance from the centre grows with the angle, not with its tangent.

    Raises:
        InputError: numbers that no lens has.
    """

    width: int
    height: int
    focal: tuple[float, float]
    centre: tuple[float, float]
    radial: tuple[float, ...] = ()
    divisor: tuple[float, ...] = ()
    tangential: tuple[float, float] = (0.0, 0.0)
    fisheye: bool = False

    def __post_init__(self) -> None:
        numbers = (*self.focal, *self.centre, *self.radial, *self.divisor, *self.tangential)
        sizes = 1 <= self.width <= _LARGEST_SIDE and 1 <= self.height <= _LARGEST_SIDE
        if not sizes or not all(abs(number) < _LARGEST_NUMBER for number in numbers) or min(self.focal) <= 0:
            got = f"{self.width} x {self.height} with focal lengths {self.focal}, coefficients {numbers[2:]}"
            raise InputError("a lens: a size of pixels, focal lengths above 0, finite coefficients", got, "correct it")

    @property
    def is_pinhole(self) -> bool:
        return not self.fisheye and not any((*self.radial, *self.divisor, *self.tangential))

    def resized(self, width: int, height: int) -> Lens:
        """The same lens on photographs of another size."""
        across, down = width / self.width, height / self.height
        focal = (self.focal[0] * across, self.focal[1] * down)
        centre = (self.centre[0] * across, self.centre[1] * down)
        return replace(self, width=width, height=height, focal=focal, centre=centre)


def lens_of(width: int, height: int, numbers: Mapping[str, float], *, fisheye: bool = False) -> Lens:
    """From coefficients by their usual names.

    Args:
        numbers: ``f``, or ``fx`` and ``fy``; ``cx``, ``cy``; and what there is of ``k1`` to ``k6``, ``p1``, ``p2``.
    """
    k = [numbers.get(f"k{power}", 0.0) for power in range(1, 7)]
    return Lens(
        width,
        height,
        (numbers.get("fx", numbers.get("f", 0.0)), numbers.get("fy", numbers.get("f", 0.0))),
        (numbers["cx"], numbers["cy"]),
        radial=tuple(k[: 4 if fisheye else 3]),
        divisor=() if fisheye else tuple(k[3:]),
        tangential=(0.0, 0.0) if fisheye else (numbers.get("p1", 0.0), numbers.get("p2", 0.0)),
        fisheye=fisheye,
    )


def distort(lens: Lens, points: Tensor) -> Tensor:
    """Where a lens puts the points that a pinhole would see.

    Args:
        points: [..., 2], normalised.

    Returns:
        [..., 2] normalised, NaN beyond the field in which the model is one to one: further out it folds back.
    """
    plane = points
    if lens.fisheye:
        radius = points.norm(dim=-1, keepdim=True)
        plane = points * torch.where(radius > 0, radius.atan() / radius, 1.0)
    bent, slopes = _bend(lens, plane)
    good = (plane.norm(dim=-1) <= _field(lens)) & (_determinant(slopes) > 0)
    return bent.where(good[..., None], torch.nan)


def undistort_points(lens: Lens, points: Tensor) -> Tensor:
    """The inverse of `distort`, by Newton's method in float64.

    Returns:
        [..., 2] normalised, in the dtype of the points; NaN where the lens puts nothing.
    """
    target = points.double()
    limit = _field(lens)
    plane = _shortened(target, limit)
    for _ in range(_NEWTON_STEPS):
        bent, slopes = _bend(lens, plane)
        missing = target - bent
        if not bool((missing.abs() > 1e-13).any()):
            break
        xx, xy, yy = slopes
        across = yy * missing[..., 0] - xy * missing[..., 1]
        down = xx * missing[..., 1] - xy * missing[..., 0]
        step = torch.stack([across, down], -1) / _determinant(slopes)[..., None]
        plane = _shortened(plane + step.nan_to_num(0.0, 0.0, 0.0), limit)
    bent, slopes = _bend(lens, plane)
    good = ((target - bent).abs().amax(-1) < _CONVERGED) & (_determinant(slopes) > 0)
    if lens.fisheye:
        angle = plane.norm(dim=-1, keepdim=True)
        plane = plane * torch.where(angle > 0, angle.tan() / angle, 1.0)
    return plane.where(good[..., None], torch.nan).to(points.dtype)


@lru_cache(maxsize=256)
def straight(lens: Lens) -> tuple[tuple[float, float], tuple[float, float]]:
    """Focal lengths and centre of the pinhole camera of the photograph's own size that sees no black border.

    As OpenCV's ``getOptimalNewCameraMatrix`` with alpha 0: the largest upright rectangle between the straightened
    edges of the photograph fills the picture; but no focal length sinks below half the lens's own, so that a wide
    fisheye loses its rim rather than its resolution. A lens without distortion keeps its numbers.

    Raises:
        InputError: nothing is left of the photograph, the coefficients are nonsense.
    """
    if lens.is_pinhole:
        return lens.focal, lens.centre
    low, high = _inner_rectangle(lens)
    anchor = torch.zeros(2, dtype=torch.float64).clamp(low, high)
    for _ in range(200):
        if bool((high <= low).any()):
            break
        if bool(_seen(lens, _outline(low, high)).all()):
            size = torch.tensor([lens.width, lens.height], dtype=torch.float64)
            focal = size / (high - low)
            (fx, fy), (cx, cy) = focal.tolist(), (-low * focal).tolist()
            return (fx, fy), (cx, cy)
        low, high = anchor + 0.98 * (low - anchor), anchor + 0.98 * (high - anchor)
    got = f"radial {lens.radial}, divisor {lens.divisor}, tangential {lens.tangential}"
    raise InputError("a lens of which a straight picture is left", got, "correct its coefficients")


def undistort(image: Tensor, lens: Lens, camera: Camera) -> Tensor:
    """A photograph as a pinhole camera at the same place would have taken it, bilinear, antialiased where reduced.

    Args:
        image: uint8 [h, w, c], what the lens shows, of any size.
        camera: what to make; only its size, focal lengths and centre matter. See `straight`.

    Returns:
        uint8 [camera.height, camera.width, c], 0 where the camera sees beyond the photograph.
    """
    ratio = max(
        lens.focal[0] / lens.width * image.shape[1] / camera.focal[0],
        lens.focal[1] / lens.height * image.shape[0] / camera.focal[1],
    )
    # Some pixels too many of a size that was rounded up do not alias.
    fine = max(1, math.ceil(ratio - 0.1))
    sampled = camera.scaled(camera.width * fine, camera.height * fine)
    grid = _grid(lens, (sampled.width, sampled.height), sampled.focal, sampled.centre)
    seen = (grid.abs().amax(-1) < 2).to(image.device)
    pixels = image.permute(2, 0, 1)[None].float()
    found = torch.nn.functional.grid_sample(
        pixels, grid.to(image.device)[None], padding_mode="border", align_corners=False
    )
    mean = torch.nn.functional.avg_pool2d(found * seen, fine)
    return mean[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous()


# One set of photographs mostly has one lens; a map of millions of pixels is not kept for each of many.
@lru_cache(maxsize=1)
def _grid(lens: Lens, size: tuple[int, int], focal: tuple[float, float], centre: tuple[float, float]) -> Tensor:
    """float32 [h, w, 2] from -1 to 1 over the photograph, for each pixel; 9 where the photograph shows nothing."""
    x = (torch.arange(size[0], dtype=torch.float64) + 0.5 - centre[0]) / focal[0]
    y = (torch.arange(size[1], dtype=torch.float64) + 0.5 - centre[1]) / focal[1]
    rays = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    places = _places(lens, rays)
    return places.where(_near(lens, places)[..., None], 9.0).float()


def _places(lens: Lens, rays: Tensor) -> Tensor:
    """Of the photograph, from -1 to 1, at which the lens shows these normalised points."""
    size = rays.new_tensor([lens.width, lens.height])
    return 2 * (distort(lens, rays) * rays.new_tensor(lens.focal) + rays.new_tensor(lens.centre)) / size - 1


def _near(lens: Lens, places: Tensor) -> Tensor:
    """bool [...]: within the photograph, or no further outside than half a pixel."""
    return ((places.abs() - 1) * places.new_tensor([lens.width, lens.height]) <= 1).all(-1)


def _seen(lens: Lens, rays: Tensor) -> Tensor:
    return _near(lens, _places(lens, rays))


def _inner_rectangle(lens: Lens) -> tuple[Tensor, Tensor]:
    """Its corners [2] and [2]: between the photograph's straightened edges, and no wider than focal lengths allow."""
    focal, centre = torch.tensor([lens.focal, lens.centre], dtype=torch.float64)
    size = torch.tensor([lens.width, lens.height], dtype=torch.float64)
    reach = math.tan(_field(lens)) if lens.fisheye else _field(lens)
    least = (-centre / focal / _LEAST_FOCAL).clamp(min=-reach)
    most = ((size - centre) / focal / _LEAST_FOCAL).clamp(max=reach)
    outline = undistort_points(lens, _outline(-centre / focal, (size - centre) / focal))
    left, right, top, bottom = outline.reshape(4, _EDGE_SAMPLES, 2)
    # An edge that the model never reaches sets no bound: the field does, see `straight`.
    low = torch.stack([left[:, 0], top[:, 1]], 1).nan_to_num(-torch.inf).amax(0)
    high = torch.stack([right[:, 0], bottom[:, 1]], 1).nan_to_num(torch.inf).amin(0)
    return low.maximum(least), high.minimum(most)


def _outline(low: Tensor, high: Tensor) -> Tensor:
    """[4 * samples, 2] on the left, right, top and bottom edge of a rectangle."""
    along = torch.linspace(0, 1, _EDGE_SAMPLES, dtype=low.dtype)
    x, y = (low[axis] + along * (high[axis] - low[axis]) for axis in range(2))
    sides = [(low[0].expand_as(y), y), (high[0].expand_as(y), y), (x, low[1].expand_as(x)), (x, high[1].expand_as(x))]
    return torch.cat([torch.stack(side, 1) for side in sides])


def _bend(lens: Lens, plane: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The distorted points [..., 2], and their Jacobian, which is symmetric: d x / d x, d x / d y, d y / d y."""
    x, y = plane.unbind(-1)
    square = x * x + y * y
    above, above_slope = _series(lens.radial, square)
    below, below_slope = _series(lens.divisor, square)
    factor, slope = above / below, 2 * (above_slope * below - above * below_slope) / (below * below)
    p1, p2 = lens.tangential
    bent = [
        x * factor + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * factor + 2 * p2 * x * y + p1 * (square + 2 * y * y),
    ]
    slopes = (
        factor + slope * x * x + 2 * p1 * y + 6 * p2 * x,
        slope * x * y + 2 * p1 * x + 2 * p2 * y,
        factor + slope * y * y + 6 * p1 * y + 2 * p2 * x,
    )
    return torch.stack(bent, -1), slopes


def _series(coefficients: tuple[float, ...], square: Tensor) -> tuple[Tensor, Tensor]:
    """1 + k1 s + k2 s^2 + ... and its derivative by s (Horner)."""
    value, slope = torch.zeros_like(square), torch.zeros_like(square)
    for coefficient in (*coefficients[::-1], 1.0):
        value, slope = value * square + coefficient, slope * square + value
    return value, slope


def _determinant(slopes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return slopes[0] * slopes[2] - slopes[1] * slopes[1]


def _shortened(plane: Tensor, limit: float) -> Tensor:
    length = plane.norm(dim=-1, keepdim=True)
    return torch.where(length > limit, plane * (limit / length), plane)


@lru_cache(maxsize=256)
def _field(lens: Lens) -> float:
    """The radius (for a fisheye the angle) up to which the radial part grows: where its derivative, or its divisor,
    first reaches 0."""
    above, below = Polynomial([1.0, *lens.radial]), Polynomial([1.0, *lens.divisor])
    # With s = r^2 the derivative of r * above / below has this numerator.
    slope = above * below + 2 * Polynomial([0, 1]) * (above.deriv() * below - above * below.deriv())
    squares = np.concatenate([part.trim(1e-30).roots() for part in (slope, below)])
    real = squares.real[(np.abs(squares.imag) < 1e-9 * np.abs(squares)) & (squares.real > 0)]
    return min(math.sqrt(float(real.min(initial=math.inf))), _WIDEST_ANGLE if lens.fisheye else math.inf)
