"""`scrimp splats render`: pictures of a scene."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch

from scrimp.jobs.folder import choose_folder, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.splats_compress import stem
from scrimp.jobs.splats_config import SplatsRenderConfig
from scrimp.jobs.splats_pictures import choose_device, looks_at, png
from scrimp.primitives.files import write_atomic
from scrimp.splats.camera import Camera
from scrimp.splats.files import read
from scrimp.splats.render import render
from scrimp.splats.scene import Splats


def splats_render(config: SplatsRenderConfig, *, scene: Splats | None = None) -> list[Path]:
    """Draw; returns the pictures' paths. ``resume=True`` draws those that are not there yet.

    Args:
        scene: instead of the one in ``config.scene``.

    Raises:
        InputError: scene or cameras cannot be used, or the folder holds something already.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    splats = read(config.scene, on_bad=config.on_bad) if scene is None else scene
    looks = looks_at(splats, config, None if config.cameras else config.orbit)
    folder = choose_folder(config.out, f"splats-{stem(config.scene)}-pictures", resume=config.resume)
    splats = splats.to(choose_device(config.device), torch.float32)
    record_config(folder, config, {})
    paths = [folder / name for name in file_names(looks.names)]
    with progress_bar(shown=not config.json) as progress, stop_requests() as stop:
        bar = add_bar(progress, "pictures", total=len(paths))
        for path, camera in zip(paths, looks.cameras, strict=True):
            if not (config.resume and path.is_file()):
                write_atomic(path, _draw(splats, camera, config))
            progress.advance(bar)
            if stop() and path != paths[-1]:
                raise Interrupted
    return paths


def file_names(names: list[str]) -> list[str]:
    """Of the pictures: the photographs' own, without folders; numbered where two would be one."""
    plain = [PurePosixPath(name.replace("\\", "/")).stem for name in names]
    if len(set(plain)) < len(plain):
        plain = [f"{place:04}-{name}" for place, name in enumerate(plain)]
    return [f"{name}.png" for name in plain]


def _draw(splats: Splats, camera: Camera, config: SplatsRenderConfig) -> bytes:
    with torch.no_grad():
        return png(render(splats, camera, background=config.background, antialias=config.antialias))
