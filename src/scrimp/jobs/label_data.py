"""What `scrimp label` chooses from: images with names to find them by, and what is known of their classes."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.data import FileImages, ImageData, Images, load_images
from scrimp.data.folders import unlabelled_source
from scrimp.data.images import pair_of, read_all
from scrimp.data.load import channel_statistics
from scrimp.data.named import BUILTIN, NAMED
from scrimp.jobs.encoders import Encoder, load_encoder
from scrimp.jobs.label_config import OWN, PIXELS, LabelConfig
from scrimp.primitives.errors import InputError

_SIDE = 16  # of the images that stand in for features
_DECODED = 32  # side that files are decoded at for that


@dataclass(frozen=True, eq=False)
class LabelPool:
    """Images to choose from.

    Attributes:
        data: the images (`train`), with test images and classes where ``labelled``.
        names: of each image: its path below the folder, with forward slashes, or its number.
        labelled: whether the data came with labels, of the images and of test images.
    """

    data: ImageData
    names: tuple[str, ...]
    labelled: bool

    @property
    def paths(self) -> tuple[str, ...] | None:
        """The files, where there are any."""
        images = self.data.train
        return images.paths if isinstance(images, FileImages) else None

    def __len__(self) -> int:
        return len(self.names)


def load_pool(config: LabelConfig, data: Any, encoder: Encoder | None) -> tuple[LabelPool, Encoder]:
    """The images and what looks at them, at the size it wants.

    Args:
        data: anything `scrimp.data.load_images` takes, instead of ``config.data``.
        encoder: a ready one, instead of that of ``config.encoder``.

    Raises:
        InputError: either cannot be used.
    """
    source = config.data if data is None else data

    @functools.cache
    def load(size: int | None) -> LabelPool:
        return _pool(config, source, size)

    if encoder is None and config.encoder == PIXELS:
        pool = load(config.size or (_DECODED if _is_folder(source) else None))
        return pool, _shrinker(pool.data)
    if encoder is None:
        asked = {"model": config.model, "pretrained": config.pretrained, "size": config.size}
        encoder = load_encoder(config.encoder, **asked, data=lambda: load(config.size).data)  # type: ignore[arg-type]
    return load(encoder.size), encoder


def _pool(config: LabelConfig, source: Any, size: int | None) -> LabelPool:
    wants_own = not config.classes and config.oracle in (None, OWN)
    if _is_folder(source) and not wants_own:
        return _unlabelled(config, source, size)
    if config.classes:
        raise InputError("a folder of images for --classes", f"{source}", "leave --classes out: the set has its own")
    try:
        # Files stay files: people are shown the originals, and labels are kept by their names.
        found = load_images(source, size=size, on_corrupt=config.on_corrupt, **_as_files(source))
    except InputError as error:
        if _is_folder(source) and "one folder of images per class" in error.expected:
            remedy = "name the classes, --classes NAME NAME, or pass --oracle FOLDER or CSV"
            raise InputError("class folders, or the names of the classes", error.got, remedy) from error
        raise
    return LabelPool(found, _names(found.train, source), wants_own)


def _as_files(source: Any) -> dict[str, Any]:
    return {"cache_bytes": 0} if _is_folder(source) else {}


def _unlabelled(config: LabelConfig, folder: Any, size: int | None) -> LabelPool:
    source = unlabelled_source(folder, size=None if size is None else pair_of(size))
    images = source.train
    skipped: tuple[str, ...] = ()
    assert isinstance(images, FileImages)
    if config.on_corrupt == "skip":
        _, broken = read_all(images, keep=False, skip=True)
        skipped = tuple(images.name_of(row) for row in broken)
        sound = torch.ones(len(images), dtype=torch.bool)
        sound[broken] = False
        images = images.take(sound.nonzero().flatten())
    if len(images) == 0:
        raise InputError("a readable image", f"none; {len(skipped)} were skipped", "check the files")
    mean, std = channel_statistics(images)
    data = ImageData(images, images, (), source.name, mean, std, skipped)
    return LabelPool(data, _names(images, folder), labelled=False)


def _is_folder(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and source not in (BUILTIN, *NAMED)


def _names(images: Images, source: Any) -> tuple[str, ...]:
    if not isinstance(images, FileImages):
        return tuple(f"{row:0{len(str(len(images)))}d}.png" for row in range(len(images)))
    top = Path(source).expanduser() if _is_folder(source) else Path(os.path.commonpath(images.paths))
    return tuple(Path(os.path.relpath(path, top)).as_posix() for path in images.paths)


class _Shrink(nn.Module):
    """Images [n, C, H, W] -> their pixels at 16 x 16, [n, 256 C]."""

    def forward(self, images: Tensor) -> Tensor:
        return functional.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True).flatten(1)


def _shrinker(data: ImageData) -> Encoder:
    channels, height, _ = data.train.shape
    return Encoder(
        model=_Shrink(),
        name=PIXELS,
        dim=channels * _SIDE**2,
        channels=channels,
        size=height,
        mean=data.mean,
        std=data.std,
    )
