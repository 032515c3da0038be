"""Tasks of the attention sampling benchmarks: large images with exact labels and boxes, and each way's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrained.fetch import cache_folder
from scrimp.jobs.zoom_files import Gallery
from zoom_data import Make, make, read_table
from zoom_items import Box
from zoom_mnist import megapixel_mnist

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """Images and what is known of each: the boxes that tell its label, left, top, width and height in pixels."""

    gallery: Gallery
    boxes: tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Task:
    """Data, and how each way is trained on them.

    Attributes:
        epochs: passes of attention sampling; every other way gets the FLOPs that these take.
        ways: what differs from ``shared``, of each.
        load: training and test part; made where they are not there.
    """

    name: str
    epochs: float
    shared: Settings
    ways: Mapping[str, Settings]
    load: Callable[[], tuple[Part, Part]]


def sparse_digits(split: str, count: int, side: int) -> Part:
    """Megapixel MNIST as what is on it: no canvas is ever built."""
    maker = megapixel_mnist(split, side)
    images = [maker.sparse(number) for number in range(count)]
    # All five digits are worth a look, but three tell the class.
    boxes = tuple(tuple(box for box in image.boxes if box.label == str(image.label)) for image in images)
    return Part(Gallery(images, [str(image.label) for image in images]), boxes)


def stored(kind: str, split: str, count: int) -> Part:
    """Tiled TIFF files in the cache, made once."""
    folder = cache_folder() / "zoom" / f"{kind}-{count}"
    order = Make(kind, folder, count=count, split=split, format="tiff")  # type: ignore[arg-type]
    table = folder / f"{split}.csv"
    rows = read_table(table if table.is_file() else make(order))
    images = [str(folder / row.path) for row in rows]
    return Part(Gallery(images, [row.label for row in rows]), tuple(row.boxes for row in rows))


@functools.lru_cache(maxsize=1)
def mnist() -> tuple[Part, Part]:
    return sparse_digits("train", 5000, 1500), sparse_digits("test", 1000, 1500)


@functools.lru_cache(maxsize=1)
def signs() -> tuple[Part, Part]:
    return stored("signs", "train", 700), stored("signs", "test", 280)


@functools.lru_cache(maxsize=1)
def modules() -> tuple[Part, Part]:
    return stored("modules", "train", 700), stored("modules", "test", 280)


# Peak rates were not searched: one for each way of a task, the same for all seeds.
TASKS = {
    "mnist": Task(
        "mnist",
        epochs=12,
        shared={"features": "convnet"},
        ways={
            "zoom": {
                "view": 300, "attention": "contrast-6", "patches": 10, "patch_size": (50,), "lr": 3e-3,
                "evaluations": 12,
            },
            "abmil": {"patch_size": (50,), "patches": 10, "batch_size": 4},
            "whole": {"features": "convnet-16-mean", "batch_size": 4},
            "whole-half": {"method": "whole", "features": "convnet-16-mean", "whole_size": 750, "batch_size": 8},
        },
        load=mnist,
    ),
    "signs": Task(
        "signs",
        epochs=20,
        shared={"features": "convnet", "augment": "flip"},
        ways={
            "zoom": {
                "view": 512, "attention": "contrast-8", "patches": 5, "patch_size": (112,), "batch_size": 16,
                "lr": 2e-3, "evaluations": 5,
            },
            "abmil": {"patch_size": (128,), "patches": 5, "batch_size": 2},
            "whole": {"batch_size": 4},
            "whole-half": {"method": "whole", "whole_size": 1024, "batch_size": 8},
            "whole-quarter": {"method": "whole", "whole_size": 512, "batch_size": 16},
        },
        load=signs,
    ),
    "modules": Task(
        "modules",
        epochs=20,
        shared={"features": "convnet", "augment": "flip"},
        ways={
            "zoom": {
                "view": 600, "attention": "contrast-20", "patches": 8, "patch_size": (100, 300), "batch_size": 16,
                "lr": 2e-3, "evaluations": 10,
            },
            "abmil": {"patch_size": (300,), "patches": 8, "batch_size": 2},
            "whole": {"batch_size": 2},
            "whole-third": {"method": "whole", "whole_size": 1000, "batch_size": 8},
        },
        load=modules,
    ),
}  # fmt: skip
