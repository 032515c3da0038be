"""Pictures of scenes: from which cameras, how alike two scenes' are, and as PNG."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.jobs.device import pick_device
from scrimp.jobs.splats_config import LookConfig
from scrimp.primitives.errors import InputError, require
from scrimp.splats.camera import Camera
from scrimp.splats.dataset import open_dataset
from scrimp.splats.loss import psnr
from scrimp.splats.orbit import UPS, orbit_cameras, orbit_of, up_of_cameras
from scrimp.splats.render import render
from scrimp.splats.scene import Splats

MOST_PSNR = 100.0
"""Of equal pictures, in dB, whose PSNR is infinite."""
_SIDE = 800  # pixels, where nobody says
_AMPLIFIED = 8


@dataclass(frozen=True, eq=False)
class Looks:
    """From where a scene is looked at.

    Attributes:
        names, cameras: one or more.
        centre: [3], what they look at.
        up: direction upwards.
        told: where they come from, in words.
    """

    names: list[str]
    cameras: list[Camera]
    centre: Tensor
    up: tuple[float, float, float]
    told: str


def choose_device(asked: str) -> str:
    """Where to draw: as `pick_device`, except that ``auto`` takes an accelerator only where it can draw."""
    if asked != "auto":
        return pick_device(asked)
    return "cuda" if torch.cuda.is_available() and importlib.util.find_spec("gsplat") else "cpu"


def looks_at(splats: Splats, config: LookConfig, count: int | None) -> Looks:
    """The cameras that were asked for.

    Args:
        count: of pictures; None for all of the cameras'.

    Raises:
        InputError: no Gaussians to look at, or cameras that cannot be read.
    """
    if config.cameras is not None:
        return _from_photographs(splats, config, count)
    up = UPS["y-down" if config.up == "auto" else config.up]
    orbit = orbit_of(splats, up=up)
    width = config.width or config.height or _SIDE
    cameras = orbit_cameras(orbit, count or 1, width=width, height=config.height or width)
    told = f"a circle around the scene, {'y-down' if config.up == 'auto' else config.up}"
    return Looks([f"{place:03}" for place in range(len(cameras))], cameras, orbit.centre, up, told)


def pictures_of(splats: Splats, cameras: Sequence[Camera], seen: Callable[[], None] | None = None) -> list[Tensor]:
    """What the cameras see, [h, w, 3] from 0 to 1, on the CPU; ``seen`` is called after each."""
    pictures = []
    for camera in cameras:
        with torch.no_grad():
            pictures.append(render(splats, camera).clamp(0, 1).cpu())
        if seen is not None:
            seen()
    return pictures


def likeness(pictures: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """PSNR of each picture against the other in dB, at most `MOST_PSNR`."""
    return [min(MOST_PSNR, float(psnr(one, other))) for one, other in zip(pictures, others, strict=True)]


def png(picture: Tensor) -> bytes:
    """A PNG of a picture [h, w, 3] from 0 to 1."""
    images = require("PIL.Image", "splats")
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    content = io.BytesIO()
    images.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Grey where two pictures are equal; elsewhere what the first has more or less, eight times as strong."""
    return (0.5 + _AMPLIFIED * (one - other)).clamp(0, 1)


def _from_photographs(splats: Splats, config: LookConfig, count: int | None) -> Looks:
    assert config.cameras is not None
    if not len(splats):
        raise InputError("one Gaussian or more", "none", "check the scene")
    views = open_dataset(config.cameras, test_every=0, on_missing="skip").views
    if count is not None and count < len(views):
        views = [views[round(place * (len(views) - 1) / max(1, count - 1))] for place in range(count)]
    cameras = [_sized(view.camera, config) for view in views]
    up = up_of_cameras(cameras) if config.up == "auto" else UPS[config.up]
    return Looks([view.name for view in views], cameras, _focus(splats, cameras[0]), up, f"{len(cameras)} cameras")


def _sized(camera: Camera, config: LookConfig) -> Camera:
    """In the size asked for; of one side alone, the other follows."""
    if config.width is None and config.height is None:
        return camera
    width = config.width or max(1, round(camera.width * (config.height or 1) / camera.height))
    height = config.height or max(1, round(camera.height * width / camera.width))
    return camera.scaled(width, height)


def _focus(splats: Splats, camera: Camera) -> Tensor:
    """A place on the camera's axis, as far away as the scene's middle."""
    position = camera.position.double()
    forward = camera.world_to_camera[2, :3].double()
    depth = float((orbit_of(splats).centre - position) @ forward)
    return position + (depth if math.isfinite(depth) and depth > 0 else 1.0) * forward
