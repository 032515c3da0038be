"""Features for benchmarks/label_accuracy.py, made once: images of three sets through a packaged network."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.data import load_images
from scrimp.data.images import Images, TensorImages
from scrimp.jobs.encode import encode
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights

NETWORK = "tf_efficientnet_lite0"
SIDE = 128  # pixels
POOL, SHOWN = 5000, 1500
HELD = 200  # solar cells of either kind that are tested on


@dataclass(frozen=True, eq=False)
class Table:
    """Features [n, dim] and class numbers [n], of the pool and of the test images."""

    pool: Tensor
    pool_labels: Tensor
    test: Tensor
    test_labels: Tensor


Sets = tuple[Images, Images]


def named(name: str, key: int) -> Sets:
    """Some images of a set known by name, drawn once for all: the pool, and those that are tested on."""
    data = load_images(name)

    def some(images: Images, count: int, part: int) -> Images:
        rows = torch.randperm(len(images), generator=generator_for(key, part))
        return images.take(rows[:count].sort().values)

    return some(data.train, POOL, 0), some(data.test, SHOWN, 1)


def cells() -> Sets:
    """Photographs of solar cells, surely whole or surely broken; as many of either in the test, so chance is a half."""
    from adapt_tasks import elpv_folder, grey

    folder = elpv_folder()
    rows = [line[0].split() for line in csv.reader((folder / "labels.csv").open())]
    sure = [(path, int(float(share))) for path, share, _ in rows if float(share) in (0.0, 1.0)]
    labels = torch.tensor([label for _, label in sure])
    pixels = torch.stack([grey(folder / path) for path, _ in sure])
    order = torch.randperm(len(sure), generator=generator_for(23))
    kinds = [order[labels[order] == kind] for kind in (0, 1)]
    held, rest = (torch.cat([kind[part] for kind in kinds]) for part in (slice(HELD), slice(HELD, None)))
    return TensorImages(pixels[rest], labels[rest]), TensorImages(pixels[held], labels[held])


SETS: dict[str, Callable[[], Sets]] = {
    "fashion-mnist": lambda: named("fashion-mnist", 21),
    "cifar10": lambda: named("cifar10", 22),
    "solar-cells": cells,
}


def table(task: str, work: Path) -> Table:
    """The features of a task, from the file in ``work`` where an earlier run left it.

    Raises:
        InputError: images or network are not there and cannot be downloaded, or the file was made otherwise.
    """
    path = work / f"{task}.safetensors"
    about = {
        "task": task,
        "side": str(SIDE),
        "pool": str(POOL),
        "shown": str(SHOWN),
        "network": NETWORK,
    }
    if not path.is_file():
        made = features(task)
        write_atomic(path, pack_weights({key: value.contiguous() for key, value in vars(made).items()}, about))
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    if found != about:
        raise InputError(f"features made by {about}", f"{found} in {path}", "pass another --work")
    return Table(**load_file(path))


def features(task: str) -> Table:
    from distillation_teachers import lite0

    encoder, parts = lite0(SIDE), SETS[task]()
    body = Body(encoder.model)
    found = [
        encode(body, images, mean=encoder.mean, std=encoder.std, size=SIDE, device="cpu", batch_size=64)
        for images in parts
    ]
    return Table(found[0], parts[0].labels, found[1], parts[1].labels)


class Body(nn.Module):
    """A network of timm's without its last convolution, which quadruples the width: images -> [n, 320]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        return model.blocks(model.bn1(model.conv_stem(images))).mean((2, 3))
