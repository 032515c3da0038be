"""A small real problem that trains in a second: digits drawn as strokes, as a data set and as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from scrimp.data import ImageData, TensorImages

SIDE, CLASSES = 16, ("bar", "cross", "ring")


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy shapes at random places: bytes [count, 1, SIDE, SIDE] and labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = torch.randint(0, 70, (count, 1, SIDE, SIDE), generator=generator)
    for image, label in zip(images[:, 0], labels.tolist(), strict=True):
        y, x = torch.randint(5, SIDE - 5, (2,), generator=generator).tolist()
        dy, dx = (rows - y).abs(), (columns - x).abs()
        near = torch.maximum(dy, dx) <= 4
        shape = (dx == 0, (dx == 0) | (dy == 0), (torch.maximum(dy, dx) == 3))[label]
        image[near & shape] += 120
    return images.to(torch.uint8), labels


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small lose more by handing work over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shapes() -> ImageData:
    """384 training and 96 test images of three shapes."""
    train, test = TensorImages(*draw(384, 0)), TensorImages(*draw(96, 1))
    return ImageData(train=train, test=test, classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,), skipped=())


@pytest.fixture(scope="session")
def shape_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes as PNG files in class folders."""
    root = tmp_path_factory.mktemp("shapes")
    for part, count, seed in (("train", 192, 0), ("test", 48, 1)):
        images, labels = draw(count, seed)
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = root / part / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{number:03d}.png")
    return root
