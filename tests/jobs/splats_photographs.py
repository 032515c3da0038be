"""Photographs of a scene that is known, as a folder with a transforms.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from PIL import Image

from scrimp.splats import Camera, Splats, look_at, render
from scrimp.splats.scene import COUNTS

SIDE = 32


def scene(count: int = 60, degree: int = 0) -> Splats:
    """A cloud of Gaussians around the origin."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(count, *shape, generator=generator) for shape in ((3,), (4,), (3,), (), (3,))]
    means, quaternions, scales, opacities, colors = draws
    harmonics = 0.2 * torch.randn(count, COUNTS[degree], 3, generator=generator)
    return Splats(means, quaternions, 0.5 * scales - 2, 2 + opacities, colors, harmonics)


def cameras(count: int) -> list[Camera]:
    up = torch.tensor([0.0, -1.0, 0.0])
    places = [4 * torch.tensor([math.sin(0.3 * i), -0.3, math.cos(0.3 * i)]) for i in range(count)]
    return [look_at(place, torch.zeros(3), up=up, width=SIDE, height=SIDE, field_of_view=50.0) for place in places]


def write_photographs(folder: Path, count: int = 7) -> Path:
    """Returns the folder; names are 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    frames, turned = [], torch.diag(torch.tensor([1.0, -1, -1, 1]))
    for place, camera in enumerate(cameras(count)):
        pixels = (render(scene(), camera, background=(1.0, 1.0, 1.0)).clamp(0, 1) * 255).round().byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{place}.png")
        pose = torch.linalg.inv(camera.world_to_camera) @ turned
        frames.append({"file_path": f"{place}.png", "transform_matrix": pose.tolist()})
    lens = {"fl_x": camera.focal[0], "w": SIDE, "h": SIDE, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(lens))
    return folder
