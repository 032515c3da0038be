"""`scrimp splats view` and `scrimp splats compare`: scenes as pages that any browser shows, offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scrimp.jobs.folder import RECEIPT
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.splats_compress import mean, stem
from scrimp.jobs.splats_config import LookConfig, SplatsCompareConfig, SplatsViewConfig
from scrimp.jobs.splats_files import beside, refuse_existing
from scrimp.jobs.splats_info import stored
from scrimp.jobs.splats_pictures import Looks, choose_device, likeness, looks_at, pictures_of, png
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt
from scrimp.report import units
from scrimp.report.splats_page import Side, View, compare_page, scene_page
from scrimp.splats.camera import Camera
from scrimp.splats.files import read
from scrimp.splats.scene import Splats
from scrimp.splats.sog import write_sog

_DRAWN_AS_SOG = "Drawn from a .sog"
_AROUND, _SMALL = 8, 96  # views on the circle to choose the first one from, and their width


def splats_view(config: SplatsViewConfig) -> Path:
    """Write the page of one scene; returns its path.

    Raises:
        InputError: the scene cannot be used, or the page exists.
    """
    config.check()
    out = config.out or beside(config.scene, ".html")
    refuse_existing(out)
    splats = _read(config.scene, config)
    scene = splats.to(choose_device(config.device))
    looks = looks_at(splats, config, 1 if config.cameras else _AROUND)
    if not config.cameras:
        small = [camera.scaled(_SMALL, _height(camera)) for camera in looks.cameras]
        looks = replace(looks, cameras=[looks.cameras[clearest(pictures_of(scene, small))]])
    (drawn,) = pictures_of(scene, looks.cameras)
    page = scene_page(
        as_sog(splats, config.scene),
        title=stem(config.scene),
        camera=start_of(looks),
        text=_size(config.scene),
        count=len(splats),
        picture=png(drawn),
        antialiased=splats.antialiased,
    )
    return write_atomic(out, page)


def splats_compare(config: SplatsCompareConfig) -> Path:
    """Write the page of two scenes; returns its path.

    Raises:
        InputError: a scene cannot be used, or the page exists.
    """
    config.check()
    out = config.out or beside(config.right, ".html")
    refuse_existing(out)
    device = choose_device(config.device)
    with progress_bar() as progress:
        bar = add_bar(progress, "compare", total=4)
        paths = (config.left, config.right)
        scenes = [_read(path, config) for path in paths]
        looks = looks_at(scenes[0], config, config.views)
        progress.update(bar, completed=1)
        drawn = [pictures_of(scene.to(device), looks.cameras) for scene in scenes]
        progress.update(bar, completed=2)
        first = 0 if config.cameras else clearest(drawn[0])
        sides = [_side(path, scene, found[first]) for path, scene, found in zip(paths, scenes, drawn, strict=True)]
        progress.update(bar, completed=4)
    scores = likeness(drawn[1], drawn[0])
    text = (
        f"{mean(scores):.2f} dB between their pictures, {min(scores):.2f} dB at worst; "
        f"{len(scores)} views, {looks.told}. Sizes in the table are the files' own."
    )
    table = [["", sides[0].name, sides[1].name], *_rows(paths, scenes)]
    title = f"{sides[0].name} and {sides[1].name}"
    camera = start_of(replace(looks, cameras=looks.cameras[first:]))
    return write_atomic(out, compare_page(sides[0], sides[1], title=title, camera=camera, text=text, table=table))


def as_sog(splats: Splats, path: Path | None = None) -> bytes:
    """A scene as a .sog; that of the file itself where it is one, else without what a .sog has no place for."""
    if path is not None and path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\3\4":
            return path.read_bytes()
    return write_sog(splats.to("cpu", torch.float32), lossy=True)


def clearest(pictures: Sequence[Tensor]) -> int:
    """Which picture [h, w, 3] differs most from its own mean colour: no scene says which of its sides is the front."""
    spread = [float((picture - picture.mean((0, 1))).square().mean()) for picture in pictures]
    return spread.index(max(spread))


def start_of(looks: Looks) -> View:
    """The first camera, as a page takes it."""
    camera = looks.cameras[0]
    position, target = _three(camera.position), _three(looks.centre)
    fov = 2 * torch.rad2deg(torch.atan(torch.tensor(camera.height / 2 / camera.focal[1], dtype=torch.float64)))
    return View(position, target, fov=float(fov), up=looks.up)


def _height(camera: Camera) -> int:
    return max(1, round(camera.height * _SMALL / camera.width))


def _three(vector: Tensor) -> tuple[float, float, float]:
    x, y, z = vector.double().tolist()
    return (x, y, z)


def _read(path: Path, config: LookConfig) -> Splats:
    return read(path, on_bad=config.on_bad).to("cpu", torch.float32)


def _side(path: Path, splats: Splats, drawn: Tensor) -> Side:
    return Side(as_sog(splats, path), path.name, _size(path), len(splats), png(drawn), splats.antialiased)


def _size(path: Path) -> str:
    return f"{_DRAWN_AS_SOG}; {path.name} takes {units.size(stored(path))}"


def _rows(paths: tuple[Path, Path], scenes: list[Splats]) -> list[list[str]]:
    """What each is and, of a run folder's scene, what making it cost."""
    receipts = [_receipt_of(path) for path in paths]
    rows = [
        ["stored", *(units.size(stored(path)) for path in paths)],
        [
            "bytes a Gaussian",
            *(units.number(stored(path) / len(scene)) for path, scene in zip(paths, scenes, strict=True)),
        ],
        ["Gaussians", *(units.count(len(scene)) for scene in scenes)],
        ["degree of harmonics", *(str(scene.degree) for scene in scenes)],
    ]
    if any(receipts):
        for name in ("cpu_seconds", "seconds", "peak_bytes", "joules"):
            title, said = units.COSTS[name]
            values = [getattr(receipt.cost, name).value if receipt else None for receipt in receipts]
            rows.append([title, *(said(value) for value in values)])
    return rows


def _receipt_of(path: Path) -> Receipt | None:
    """Of the run folder that a scene lies in."""
    file = path.resolve().parent / RECEIPT
    try:
        return load_receipt(file) if file.is_file() else None
    except InputError:
        return None
