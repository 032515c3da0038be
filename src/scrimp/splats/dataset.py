"""Photographs with poses: what a scene is fitted to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.colmap import find_model, read_colmap
from scrimp.splats.distortion import Lens, straight, undistort
from scrimp.splats.photos import Photo, Posed, read_alpha, read_grey, read_pixels
from scrimp.splats.transforms import read_transforms

_MODELS_FIRST = ("sparse/0", "sparse")
_MODELS_LAST = ("colmap/sparse/0", "colmap/sparse", "colmap", ".")
_SUPERSAMPLED = 2  # pixels a side that make one of the picture, where they are there


@dataclass(frozen=True, eq=False)
class View:
    """One photograph, from where it was taken.

    Attributes:
        name: as its set calls it.
        camera: a pinhole of the size to train at; another may be put in its place.
        image: the file, as the lens saw it.
        mask: a file, black where the photograph must not count.
        lens: what the file was taken through, for the file's size.
    """

    name: str
    camera: Camera
    image: Path
    mask: Path | None
    lens: Lens


@dataclass(frozen=True, eq=False)
class Dataset:
    """Photographs of one scene.

    Attributes:
        train, test: views, each sorted by name.
        points: float32 [n, 3], a sparse cloud of the scene, where the set has one.
        colors: uint8 [n, 3], of the points, where the set has them.
        background: red, green, blue from 0 to 1, behind photographs that are transparent.
    """

    train: tuple[View, ...]
    test: tuple[View, ...]
    points: Tensor | None
    colors: Tensor | None
    background: tuple[float, float, float]

    @property
    def views(self) -> list[View]:
        """All, sorted by name."""
        return sorted((*self.train, *self.test), key=lambda view: view.name)

    @property
    def scene_scale(self) -> float:
        """1.1 times the largest distance of a training camera from the middle of them, as 3DGS has its
        ``cameras_extent``; 0 where all stand in one place."""
        places = torch.stack([view.camera.position for view in self.train]).double()
        return 1.1 * float((places - places.mean(0)).norm(dim=1).max())

    def load(self, view: View) -> Tensor:
        """The photograph as the view's camera sees it: uint8 [h, w, 3], undistorted and reduced. Nothing is kept.

        Black where a camera that was put in place of the set's own sees beyond the photograph.

        Raises:
            InputError: the file cannot be decoded.
        """
        return _straightened(view, partial(read_pixels, view.image, background=self.background))

    def load_mask(self, view: View) -> Tensor | None:
        """What counts: uint8 [h, w], 255 in full and 0 not at all, of the mask's file or else the picture's opacity.

        ``None`` where it all counts. Where there is no mask's file it is the silhouette of what was laid on the
        background.

        Raises:
            InputError: a file cannot be decoded.
        """
        size = _source_size(view)
        found = read_alpha(view.image, size) if view.mask is None else read_grey(view.mask, size)
        return None if found is None else _straightened(view, lambda size: found)[..., 0]


def open_dataset(
    path: str | os.PathLike[str],
    *,
    longest: int | None = None,
    images: str | None = None,
    test_every: int = 8,
    on_missing: str = "refuse",
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Dataset:
    """Find a set of photographs with poses. Their heads are read, no pixels.

    Taken is the first there is of: a sparse model of COLMAP in ``sparse/0`` or ``sparse``; ``transforms_train.json``,
    with ``transforms_test.json`` beside it; ``transforms.json``; a model in ``colmap/sparse/0``, ``colmap/sparse``,
    ``colmap`` or the folder itself. Photographs are used as their pixels lie, as COLMAP reads them: a note on their
    orientation is not heeded.

    Args:
        path: the folder, or a ``transforms.json`` of any name.
        longest: most pixels of a picture's longer side; larger ones are reduced. All of them by default.
        images: folder with the photographs in another size, such as ``images_4``; see the readers.
        test_every: every so many views by name, from the first on, are held out for testing, as in 3DGS; 0 for none.
            Sets that say themselves what to test on are heeded; a single view is trained on.
        on_missing: ``"refuse"`` a set of which photographs are absent, or ``"skip"`` them.
        background: red, green, blue from 0 to 1, laid behind transparent photographs.

    Raises:
        InputError: no such set, a damaged one, a lens that is not supported, photographs of other proportions than
            their lens states, or none to train on.
    """
    if (longest is not None and longest < 1) or test_every < 0 or on_missing not in ("refuse", "skip"):
        got = f"longest={longest}, test_every={test_every}, on_missing={on_missing!r}"
        raise InputError("longest from 1 on, test_every from 0 on, on_missing 'refuse' or 'skip'", got, "correct it")
    found = _find(Path(path), images)
    if found.missing and on_missing == "refuse":
        names = ", ".join(found.missing[:3]) + (" ..." if len(found.missing) > 3 else "")
        got = f"{len(found.missing)} absent: {names}"
        raise InputError("every photograph of the set", got, "restore them, or pass on_missing='skip'")
    photos = sorted(found.photos, key=lambda photo: photo.name)
    train: list[View] = []
    test: list[View] = []
    for place, photo in enumerate(photos):
        regular = len(photos) > 1 and test_every > 0 and place % test_every == 0
        held_out = regular if found.held_out is None else photo.name in found.held_out
        (test if held_out else train).append(_view(photo, longest))
    if not train:
        raise InputError("photographs to train on", f"{len(test)} to test, none besides, in {path}", "check the set")
    return Dataset(tuple(train), tuple(test), found.points, found.colors, background)


def _find(path: Path, images: str | None) -> Posed:
    if path.is_file():
        return read_transforms(path, images=images)
    model = find_model(path, _MODELS_FIRST)
    if model is None and (path / "transforms_train.json").is_file():
        return _find_split(path, images)
    if model is None and (path / "transforms.json").is_file():
        return read_transforms(path / "transforms.json", images=images)
    model = model or find_model(path, _MODELS_LAST)
    if model is None:
        got = f"{path} with neither" if path.is_dir() else f"{path}, which is absent"
        raise InputError("a folder with sparse/0 of COLMAP or a transforms.json", got, "pass the set's own folder")
    return read_colmap(model, path, images=images)


def _find_split(path: Path, images: str | None) -> Posed:
    """The two files of NeRF's synthetic scenes. Their third, for validation, is left out."""
    train = read_transforms(path / "transforms_train.json", images=images)
    if not (path / "transforms_test.json").is_file():
        return train
    test = read_transforms(path / "transforms_test.json", images=images)
    names = frozenset(photo.name for photo in test.photos)
    both = sorted(names & {photo.name for photo in train.photos})
    if both:
        raise InputError("photographs to train or to test on", f"{both[0]} for both", "take it out of one file")
    return Posed(train.photos + test.photos, train.missing + test.missing, names, train.points, train.colors)


def _view(photo: Photo, longest: int | None) -> View:
    lens, (focal, centre) = photo.lens, straight(photo.lens)
    motion = photo.world_to_camera.float()
    camera = Camera(lens.width, lens.height, focal, centre, motion)
    largest = max(lens.width, lens.height)
    if longest is not None and longest < largest:
        width, height = (max(1, round(side * longest / largest)) for side in (lens.width, lens.height))
        camera = camera.scaled(width, height)
    return View(photo.name, camera, photo.image, photo.mask, lens)


def _is_whole(view: View) -> bool:
    """No more than a smaller copy of the file: nothing to straighten, nothing cut off."""
    small = view.lens.resized(view.camera.width, view.camera.height)
    numbers = zip(small.focal + small.centre, view.camera.focal + view.camera.centre, strict=True)
    return view.lens.is_pinhole and all(abs(own - asked) < 1e-3 for own, asked in numbers)


def _source_size(view: View) -> tuple[int, int]:
    """To which the file is reduced as it is read."""
    camera, lens = view.camera, view.lens
    if _is_whole(view) and camera.width <= lens.width and camera.height <= lens.height:
        return camera.width, camera.height
    across, down = (_SUPERSAMPLED * made / own for made, own in zip(camera.focal, lens.focal, strict=True))
    share = min(1.0, max(across, down))
    return max(1, round(lens.width * share)), max(1, round(lens.height * share))


def _straightened(view: View, read: Callable[[tuple[int, int]], Tensor]) -> Tensor:
    size = _source_size(view)
    pixels = read(size)
    whole = _is_whole(view) and size == (view.camera.width, view.camera.height)
    return pixels if whole else undistort(pixels, view.lens, view.camera)
