"""Which large images there are and what is said of each: class folders, tables, plain folders."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scrimp.data.folders import SUFFIXES, TEST_NAMES, TRAIN_NAME
from scrimp.data.open_image import SLIDES, LargeImage
from scrimp.data.source import listed
from scrimp.primitives.errors import InputError

ENDINGS = SUFFIXES | SLIDES | {".npy", ".svs", ".zarr"}
"""Endings of what is taken for a large image, in small letters."""

_TABLE = ".csv"
_IMAGE_COLUMNS, _LABEL_COLUMN, _SPLIT_COLUMN = ("image", "path"), "label", "split"


@dataclass(frozen=True)
class Gallery:
    """Large images, and what is said of each.

    Attributes:
        images: paths, or opened images; a sequence may make each when it is asked for.
        labels: one text an image, several labels separated by ";"; ``None`` where nothing is said.
        sorted: whether the labels are names of class folders.
    """

    images: Sequence[str | LargeImage]
    labels: Sequence[str] | None = None
    sorted: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, row: int) -> str:
        """What messages and tables call an image."""
        image = self.images[row]
        return image if isinstance(image, str) else f"image {row}"

    def take(self, rows: Iterable[int]) -> Gallery:
        """Only these rows, in this order."""
        kept = list(rows)
        labels = None if self.labels is None else [self.labels[row] for row in kept]
        return Gallery([self.images[row] for row in kept], labels, self.sorted)


def find_galleries(data: str | os.PathLike[str], test: Path | None = None) -> tuple[Gallery, Gallery | None]:
    """Images to train on, and to test on where the data or ``test`` say which.

    Raises:
        InputError: no such file or folder, no images in it, or a table that cannot be read.
    """
    top = Path(data).expanduser()
    first, second = _parts(top)
    if test is not None:
        second = _one(test.expanduser())
    for part in (first, second):
        if part is not None and part.labels is None:
            raise InputError("class folders, or a .csv of images and labels", f"{top} without", "sort or list them")
    return first, second


def find_unlabelled(data: str | os.PathLike[str], classes: Sequence[str]) -> Gallery:
    """Images to predict: of a table, one file, or all of a folder; labelled where class folders are the classes'.

    Raises:
        InputError: no such file or folder, or no images in it.
    """
    top = Path(data).expanduser()
    if top.is_dir() and not _is_image(top):
        folders = {item.name for item in _folders(top)}
        if folders and folders <= set(classes) and not any(map(_is_image, top.iterdir())):
            return _class_folders(top)
        found = _images_below(top)
        if not found:
            raise InputError("images", f"none below {top}", f"they end in {', '.join(sorted(ENDINGS))}")
        return Gallery(found)
    return _table(top)[0] if top.suffix == _TABLE and top.is_file() else Gallery([str(_existing(top))])


def _parts(top: Path) -> tuple[Gallery, Gallery | None]:
    if top.suffix == _TABLE:
        return _table(_existing(top))
    _existing(top)
    if not top.is_dir():
        raise InputError("a folder or a .csv", f"the file {top}", "list images and labels in a .csv")
    tables = {item.stem: item for item in top.glob(f"*{_TABLE}")}
    tests = [name for name in TEST_NAMES if name in tables or (top / name).is_dir()]
    if TRAIN_NAME in tables:
        return _table(tables[TRAIN_NAME])[0], _table(tables[tests[0]])[0] if tests and tests[0] in tables else None
    if (top / TRAIN_NAME).is_dir():
        return _class_folders(top / TRAIN_NAME), _class_folders(top / tests[0]) if tests else None
    return _class_folders(top), None


def _one(path: Path) -> Gallery:
    return _table(_existing(path))[0] if path.suffix == _TABLE else _class_folders(_existing(path))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError("a folder of images, an image or a .csv", f"{path}, which is absent", "check the path")
    return path


def _class_folders(top: Path) -> Gallery:
    found = {folder.name: _images_below(folder) for folder in _folders(top)}
    if not any(found.values()):
        raise InputError("one folder of images a class", f"none in {top}", "sort the images, or list them in a .csv")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise InputError("an image in every class folder", f"none in {listed(empty)} of {top}", "add or remove them")
    pairs = [(file, name) for name, files in found.items() for file in files]
    return Gallery([file for file, _ in pairs], [name for _, name in pairs], sorted=True)


def _folders(top: Path) -> list[Path]:
    return sorted(item for item in top.iterdir() if item.is_dir() and not item.name.startswith((".", "__")))


def _images_below(top: Path) -> list[str]:
    """Images at any depth in order of their names; a folder may be one (zarr)."""
    found: list[str] = []
    for item in sorted(top.iterdir()):
        if item.name.startswith("."):
            continue
        if _is_image(item):
            found.append(str(item))
        elif item.is_dir():
            found += _images_below(item)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _table(path: Path) -> tuple[Gallery, Gallery | None]:
    """The rows of a table, those that its split column calls test apart; paths are relative to the table."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("a .csv in UTF-8", f"{path} ({error})", "check the file") from error
    columns = list(rows[0]) if rows else []
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    if image is None:
        got = f"{', '.join(map(str, columns)) or 'nothing'} in {path}"
        raise InputError(f"rows with a column {' or '.join(_IMAGE_COLUMNS)}", got, "name the columns in the first line")
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for row in rows:
        parts[row.get(_SPLIT_COLUMN) in TEST_NAMES].append(row)
    train, test = (_gallery(part, image, path) for part in parts)
    if not len(train):
        return test, None
    return train, test if len(test) else None


def _gallery(rows: list[dict[str, str]], image: str, table: Path) -> Gallery:
    lacking = next((number for number, row in enumerate(rows, 2) if not row[image]), None)
    if lacking is not None:
        raise InputError("an image in every row", f"none in line {lacking} of {table}", "correct the table")
    images = [str(table.parent / row[image]) for row in rows]
    labelled = bool(rows) and all(row.get(_LABEL_COLUMN) is not None for row in rows)
    return Gallery(images, [row[_LABEL_COLUMN].strip() for row in rows] if labelled else None)
