"""Large images for `scrimp zoom`: small views of all of them, whose patches are read once it is known where."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.data.decode import ImageError
from scrimp.data.variants import stratified_split
from scrimp.jobs.zoom_config import ZoomTrainConfig
from scrimp.jobs.zoom_files import Gallery, find_galleries
from scrimp.jobs.zoom_labels import Target, find_target
from scrimp.jobs.zoom_readers import Readers, Shape, Views
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

_SPLIT = 7  # key of the draw of the images held out
_MEASURED = 500  # views that mean and deviation are taken from
Progress = Callable[[int, int], None]
"""Called with how many images are done and how many there are."""


class ZoomImages:
    """Views of large images with their labels, map-style, handed over as whole batches like `scrimp.data.Images`.

    Args:
        readers: of the images.
        views: of the same.
        labels: [N, ...], as `Target.encode` gives them.
        sizes: int64 [N, 2], width and height in pixels.
    """

    def __init__(self, readers: Readers, views: Views, labels: Tensor, sizes: Tensor) -> None:
        self.readers, self.views, self.labels, self.sizes = readers, views, labels, sizes

    @property
    def shape(self) -> Shape:
        """Of a view."""
        return self.views.shape

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        """Views at ``indices``, uint8 [n, C, h, w]."""
        return torch.stack([self.views.get(row) for row in indices.tolist()])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.views.get(index), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Views, labels, and the indices themselves."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.batch(rows), self.labels[rows], rows


@dataclass(frozen=True, eq=False)
class ZoomData:
    """Large images to train and to test on.

    Attributes:
        target: what is to be learnt.
        name: what receipts call the data.
        mean, std: of each channel of the training views, for pixels in 0 to 1.
        skipped: images left out because they cannot be read.
    """

    train: ZoomImages
    test: ZoomImages
    target: Target
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class or label."""
        return self.target.classes


def load_zoom_data(config: ZoomTrainConfig, source: Any, progress: Progress = lambda done, total: None) -> ZoomData:
    """The data that ``source`` stands for: a path as of ``config.data``, a gallery, or a pair (train, test) of them.

    Raises:
        InputError: data, labels or an image that cannot be used.
    """
    train, test, name = _galleries(config, source)
    labels = _labels_of(train)
    target = find_target(labels, config.task, sorted_folders=train.sorted)
    if test is None:
        train, test = _held_out(train, target, config)
    skip = config.on_corrupt == "skip"
    opened = [_opened(part, config.open_images, skip=skip) for part in (train, test)]
    shape = _view_shape(config, [sizes for _, sizes, _ in opened])
    parts, lost = [], [name for item in opened for name in item[2]]
    tick = _ticks(progress, sum(len(readers.gallery) for readers, _, _ in opened))
    for readers, sizes, _ in opened:
        part, gone = _viewed(readers, sizes, shape, target=target, config=config, tick=tick)
        parts.append(part)
        lost += gone
    if not all(map(len, parts)):
        raise InputError("images to train and to test on", f"{len(parts[0])} and {len(parts[1])}", "add images")
    mean, std = channel_statistics(parts[0])
    return ZoomData(parts[0], parts[1], target, name, mean, std, tuple(lost))


def channel_statistics(images: ZoomImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over up to 500 views spread evenly, for pixels in 0 to 1; 4 places.

    A channel that never varies gets 1 for its deviation, so that dividing by it is harmless.
    """
    count = min(len(images), _MEASURED if images.views.keeps else 16)
    sums = torch.zeros(2, images.shape[0], dtype=torch.float64)
    for place in range(count):
        pixels = images.views.get(place * len(images) // count).double() / 255
        sums += torch.stack([pixels.sum((1, 2)), pixels.square().sum((1, 2))])
    mean, square = sums / (count * math.prod(images.shape[1:]))
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std < 1e-4, 1.0, std)
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())


def stored_bytes(images: ZoomImages) -> int | None:
    """Bytes of all files; ``None`` where images are not single files."""
    paths = [Path(image) if isinstance(image, str) else None for image in images.readers.gallery.images]
    return sum(path.stat().st_size for path in paths if path) if all(p and p.is_file() for p in paths) else None


def _galleries(config: ZoomTrainConfig, source: Any) -> tuple[Gallery, Gallery | None, str]:
    if isinstance(source, Gallery):
        return source, None, "images"
    if isinstance(source, tuple):
        return source[0], source[1], "images"
    train, test = find_galleries(source, config.test)
    return train, test, Path(source).resolve().name


def _labels_of(gallery: Gallery) -> list[str]:
    if gallery.labels is None:
        raise InputError("labels", "images without", "give one text an image")
    return list(gallery.labels)


def _held_out(gallery: Gallery, target: Target, config: ZoomTrainConfig) -> tuple[Gallery, Gallery]:
    """The same share of every class, or of all where there are none, drawn by the seed."""
    labels = target.encode(_labels_of(gallery))
    numbers = labels if target.task == "classes" else torch.zeros(len(labels), dtype=torch.int64)
    rows = stratified_split(numbers, fraction=config.held_out, generator=generator_for(config.seed, _SPLIT))
    train, test = (gallery.take(part.tolist()) for part in rows)
    return train, test


def _opened(gallery: Gallery, limit: int, *, skip: bool) -> tuple[Readers, list[tuple[int, int, int]], list[str]]:
    """Readers of what can be opened, width, height and channels of each, and the names of the rest."""
    readers = Readers(gallery, limit=limit)
    sizes, kept, lost = [], [], []
    for row in range(len(gallery)):
        try:
            image = readers.open(row)
        except ImageError:
            if not skip:
                raise
            lost.append(gallery.name_of(row))
            continue
        kept.append(row)
        sizes.append((*image.size, image.channels))
    return (Readers(gallery.take(kept), limit=limit) if lost else readers), sizes, lost


def _view_shape(config: ZoomTrainConfig, parts: list[list[tuple[int, int, int]]]) -> Shape:
    """Of the training images' median form; of colours where any image has them."""
    train, every = parts[0], [size for part in parts for size in part]
    if not train:
        raise InputError("an image to train on that can be read", "none", "check the files")
    ratio = statistics.median_low(width / height for width, height, _ in train)
    longer = config.view
    if config.method == "whole":
        longer = config.whole_size or statistics.median_low(max(size[:2]) for size in train)
    width, height = (longer, longer / ratio) if ratio >= 1 else (longer * ratio, longer)
    return max(size[2] for size in every), max(1, round(height)), max(1, round(width))


def _viewed(
    readers: Readers,
    sizes: list[tuple[int, int, int]],
    shape: Shape,
    *,
    target: Target,
    config: ZoomTrainConfig,
    tick: Callable[[], None],
) -> tuple[ZoomImages, list[str]]:
    """Make all views that are kept, so that training finds them, and damaged images are found before it."""
    views = Views(readers, shape, config.cache)
    skip = config.on_corrupt == "skip"
    kept, lost = [], []
    for row in range(len(sizes)):
        try:
            if skip or views.keeps:
                views.get(row)
        except ImageError:
            if not skip:
                raise
            lost.append(readers.gallery.name_of(row))
        else:
            kept.append(row)
        tick()
    if lost:
        readers = Readers(readers.gallery.take(kept), limit=config.open_images)
        views = Views(readers, shape, config.cache)
    labels = target.encode(_labels_of(readers.gallery))
    table = torch.tensor([sizes[row][:2] for row in kept], dtype=torch.int64).view(-1, 2)
    return ZoomImages(readers, views, labels, table), lost


def _ticks(progress: Progress, total: int) -> Callable[[], None]:
    numbers: Iterable[int] = iter(range(1, total + 1))

    def tick() -> None:
        progress(next(numbers), total)  # type: ignore[call-overload]

    return tick
