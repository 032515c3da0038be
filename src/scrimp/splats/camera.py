"""A pinhole camera, as COLMAP and gsplat mean it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class Camera:
    """Axes: x to the right, y down, z forwards. A pixel's centre lies at whole number + 1/2.

    Attributes:
        width, height: of the image in pixels.
        focal: fx and fy, pixels.
        centre: cx and cy, pixels.
        world_to_camera: [4, 4], rigid.
        near: depths in front of this are not seen, units of the scene.

    Raises:
        InputError: a size or matrix that no camera has.
    """

    width: int
    height: int
    focal: tuple[float, float]
    centre: tuple[float, float]
    world_to_camera: Tensor
    near: float = 0.01

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or min(self.focal) <= 0:
            raise InputError("a picture and focal lengths above 0", f"{self.width} x {self.height}", "correct it")
        if self.world_to_camera.shape != (4, 4):
            raise InputError("world_to_camera [4, 4]", f"{list(self.world_to_camera.shape)}", "pass a rigid motion")

    @property
    def position(self) -> Tensor:
        """[3], in the world."""
        rotation, shift = self.world_to_camera[:3, :3], self.world_to_camera[:3, 3]
        return -rotation.T @ shift

    def scaled(self, width: int, height: int) -> Camera:
        """The same view in a picture of another size."""
        across, down = width / self.width, height / self.height
        return replace(
            self,
            width=width,
            height=height,
            focal=(self.focal[0] * across, self.focal[1] * down),
            centre=(self.centre[0] * across, self.centre[1] * down),
        )


def look_at(
    position: Tensor, target: Tensor, *, up: Tensor, width: int, height: int, field_of_view: float = 60.0
) -> Camera:
    """A camera at a position that looks at a target.

    Args:
        position, target, up: [3]; ``up`` points upwards in the picture.
        field_of_view: of the picture's height, degrees.
    """
    forward = torch.nn.functional.normalize(target - position, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=0)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    motion = torch.eye(4, dtype=position.dtype)
    motion[:3, :3], motion[:3, 3] = rotation, -rotation @ position
    focal = 0.5 * height / float(torch.tan(torch.deg2rad(torch.tensor(field_of_view / 2, dtype=torch.float64))))
    return Camera(width, height, (focal, focal), (width / 2, height / 2), motion)
