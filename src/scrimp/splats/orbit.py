"""Cameras around a scene, for pictures of scenes that come without cameras."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera, look_at
from scrimp.splats.scene import Splats

UPS = {
    "y-down": (0.0, -1.0, 0.0),
    "y-up": (0.0, 1.0, 0.0),
    "z-up": (0.0, 0.0, 1.0),
    "z-down": (0.0, 0.0, -1.0),
    "x-up": (1.0, 0.0, 0.0),
    "x-down": (-1.0, 0.0, 0.0),
}
"""Directions that may point upwards. The first is that of COLMAP's cameras and of most scenes trained from them;
nerfstudio's and Blender's have z up. No file of Gaussians says which it is."""
_OPAQUE = 0.5
_INSIDE = 0.9  # share of the opaque Gaussians: what lies far behind a scene is left out
_ROOM = 1.2  # long objects are still seen whole
_NEAR = 1e-3  # of the distance


@dataclass(frozen=True, eq=False)
class Orbit:
    """A circle to look from.

    Attributes:
        centre: [3] float64, what is looked at.
        radius: of the scene around it.
        up: [3] float64, of length 1.
    """

    centre: Tensor
    radius: float
    up: Tensor

    def distance(self, width: int, height: int, field_of_view: float) -> float:
        """From where the scene fills a picture whose height spans ``field_of_view`` degrees."""
        half = math.tan(math.radians(field_of_view) / 2)
        narrow = math.atan(half * min(1.0, width / height))
        return self.radius / math.sin(narrow)


def orbit_of(splats: Splats, *, up: tuple[float, float, float] = UPS["y-down"]) -> Orbit:
    """The orbit around a scene: its middle is the weighted median of the opaque Gaussians, the weights their alphas.

    Where none has an alpha of 1/2 or more all count. The radius is 1.2 times the distance that nine tenths of them lie
    within, or where they lie in one point 3 standard deviations of the widest.

    Args:
        splats: on any device.
        up: direction, of any length but 0.

    Raises:
        InputError: no Gaussians, or no direction.
    """
    length = math.hypot(*up)
    if not len(splats) or not 0 < length < math.inf:
        raise InputError("one Gaussian or more, and a direction upwards", f"{len(splats)}, {up}", "check the scene")
    means = splats.means.detach().double().cpu()
    alphas = splats.opacities.detach().double().cpu().sigmoid()
    opaque = alphas >= _OPAQUE
    if opaque.any():
        means, alphas = means[opaque], alphas[opaque]
    alphas = alphas.clamp_min(1e-12)
    centre = torch.stack([_quantile(column, alphas, 0.5) for column in means.unbind(1)])
    radius = _ROOM * float(_quantile((means - centre).norm(dim=1), alphas, _INSIDE))
    if not 0 < radius < math.inf:
        radius = 3 * math.exp(min(float(splats.scales.max()), 300.0))
    return Orbit(centre, radius, torch.tensor(up, dtype=torch.float64) / length)


def orbit_cameras(
    orbit: Orbit,
    count: int,
    *,
    width: int,
    height: int,
    elevation: float = 15.0,
    field_of_view: float = 60.0,
) -> list[Camera]:
    """Cameras at equal angles on a circle, all looking at the middle.

    Args:
        width, height: of the pictures, pixels.
        elevation: above the middle, degrees between -89 and 89.
        field_of_view: of the pictures' height, degrees.

    Raises:
        InputError: no cameras, or angles that make no picture.
    """
    if count < 1 or abs(elevation) > 89 or not 0 < field_of_view < 180:
        got = f"{count}, {elevation:g}, {field_of_view:g}"
        raise InputError(
            "a camera or more, an elevation within 89 degrees, a field of view below 180", got, "correct it"
        )
    distance = orbit.distance(width, height, field_of_view)
    front, side = _level_axes(orbit.up)
    rise = math.radians(elevation)
    cameras = []
    for step in range(count):
        turn = 2 * math.pi * step / count
        level = math.cos(turn) * front + math.sin(turn) * side
        place = orbit.centre + distance * (math.cos(rise) * level + math.sin(rise) * orbit.up)
        camera = look_at(place, orbit.centre, up=orbit.up, width=width, height=height, field_of_view=field_of_view)
        motion = camera.world_to_camera.float()
        cameras.append(replace(camera, world_to_camera=motion, near=_NEAR * distance))
    return cameras


def up_of_cameras(cameras: Iterable[Camera]) -> tuple[float, float, float]:
    """The mean of what is upwards in their pictures; "y-down" of `UPS` where they have none in common."""
    total = torch.zeros(3, dtype=torch.float64)
    for camera in cameras:
        total -= camera.world_to_camera[1, :3].double()
    x, y, z = total.tolist()
    return (x, y, z) if math.hypot(x, y, z) > 1e-6 else UPS["y-down"]


def _level_axes(up: Tensor) -> tuple[Tensor, Tensor]:
    """Two directions at right angles to ``up``; the first is -z where it can be, from where COLMAP's cameras look."""
    axis = torch.tensor([0.0, 0.0, -1.0] if abs(float(up[2])) < 0.9 else [0.0, -1.0, 0.0], dtype=torch.float64)
    front = torch.nn.functional.normalize(axis - (axis @ up) * up, dim=0)
    return front, torch.linalg.cross(front, up)


def _quantile(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """The smallest value that this share of the weights does not exceed."""
    ordered, order = values.sort()
    running = weights[order].cumsum(0)
    return ordered[torch.searchsorted(running, share * running[-1]).clamp(max=len(values) - 1)]
