"""What is drawn: Gaussians on the walls of a made-up room, and a scene trained on photographs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scrimp.data.named import data_root
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera, look_at
from scrimp.splats.files import read
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.transforms import read_transforms

BALLS = ((0.0, 0.0, 0.0), (1.5, 0.3, 0.5), (-1.4, 0.2, -0.3), (0.3, -1.2, 0.8))
DEGREE = 3


@dataclass(frozen=True, eq=False)
class Sight:
    """A scene and where it is seen from."""

    splats: Splats
    camera: Camera


def room(count: int, size: int, *, seed: int = 0) -> Sight:
    """Four balls before a wall, covered as often whatever the count: 80 % of the Gaussians are in sight.

    Args:
        size: of the picture's side, pixels.
    """
    generator = generator_for(seed, count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ball = torch.tensor(BALLS)[torch.randint(len(BALLS), (count,), generator=generator)]
    means = ball + 0.8 * torch.nn.functional.normalize(normal(count, 3), dim=1)
    wall = (torch.rand(count, 3, generator=generator) - 0.5) * torch.tensor([7.0, 7.0, 0.0]) + torch.tensor([0, 0, 2.5])
    means = torch.where(torch.rand(count, 1, generator=generator) < 0.4, wall, means)
    scales = math.log(3.2 / math.sqrt(count)) + 0.4 * normal(count, 3) - torch.tensor([0.0, 0.0, 1.0])
    harmonics = 0.2 * normal(count, COUNTS[DEGREE], 3)
    splats = Splats(means, normal(count, 4), scales, 1 + 2 * normal(count), normal(count, 3), harmonics)
    place, up = torch.tensor([0.0, -0.6, -2.2]), torch.tensor([0.0, -1.0, 0.0])
    return Sight(splats, look_at(place, torch.zeros(3), up=up, width=size, height=size, field_of_view=70.0))


def fox(width: int, height: int, *, root: Path | None = None) -> Sight:
    """The fox from its first photograph, the camera's axis in the middle of the picture as OpenSplat has it.

    What lies behind the camera is left out: OpenSplat does not.

    Raises:
        InputError: the scene is not there.
    """
    folder = data_root(root) / "scenes"
    if not (folder / "fox60k.ply").is_file():
        raise InputError("fox60k.ply and fox/transforms.json", "neither", "name the folder that has scenes in it")
    photo = read_transforms(folder / "fox" / "transforms.json").photos[0]
    lens = photo.lens
    whole = Camera(
        lens.width, lens.height, lens.focal, (lens.width / 2, lens.height / 2), photo.world_to_camera.float()
    )
    camera = replace(whole.scaled(width, height), near=0.01)
    splats = read(folder / "fox60k.ply")
    depths = splats.means @ camera.world_to_camera[2, :3] + camera.world_to_camera[2, 3]
    return Sight(replace(splats.take(depths > camera.near), extra={}), camera)
