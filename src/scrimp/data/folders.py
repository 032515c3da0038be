"""Folders of class folders: ``train/cat/1.jpg`` beside ``test/cat/2.jpg``, or ``cat/1.jpg`` to be split.

Or of pictures that nobody sorted.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from scrimp.data.decode import common_form, peek_image
from scrimp.data.images import FileImages
from scrimp.data.source import Source, listed, same_classes
from scrimp.primitives.errors import InputError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2"}
)
"""Endings of files that are taken for images, in small letters; every other file is left alone."""

TRAIN_NAME = "train"
TEST_NAMES = ("test", "val", "validation", "valid")
"""Folder names of a test split; where several exist the first of these counts."""

UNLABELLED = "unlabelled"
"""The one class of images that come without labels."""

_WITHOUT = "learn without labels: scrimp pretrain --unlabelled"


def folder_source(
    folder: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Source:
    """List a folder's images and classes.

    Classes are the names of the class folders, in order; images are looked for at any depth below them, hidden files
    and folders are not. Nothing is decoded, but heads of files are read until size and colour are settled.

    Args:
        folder: holds class folders, or ``train`` with one of `TEST_NAMES`, which hold them.
        test: class folders to test on, instead of those found in ``folder``.
        size: height and width that all images are brought to; see `common_form` when not given.

    Raises:
        InputError: no folder, no image, fewer than two classes, a class folder without an image, or splits whose
            classes differ.
    """
    top = _existing(folder)
    train_folder, test_folder = _splits(top)
    if test is not None:
        test_folder = _existing(test)
    train = _class_files(train_folder)
    held = None if test_folder is None else _class_files(test_folder)
    if held is not None:
        same_classes(train, held)
    return _source(top, train, held, size)


def unlabelled_source(
    folder: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Source:
    """List a folder's images, whatever way they lie in it, all of one class called `UNLABELLED`.

    Images are looked for at any depth; hidden files and folders are not. Where ``train`` stands beside one of
    `TEST_NAMES`, the first of these is tested on, the others are left alone and all else is trained on, folders of
    another name included.

    Args:
        folder, test, size: as for `folder_source`.

    Raises:
        InputError: no folder, or none of a part's images.
    """
    top = _existing(folder, "a folder of images")
    names = [entry.name for entry in _subfolders(top)]
    tests = [name for name in TEST_NAMES if name in names] if TRAIN_NAME in names else []
    train = _loose_files(top, leave=tests)
    held = None
    if test is not None:
        held = _loose_files(_existing(test, "a folder of images"))
    elif tests:
        held = _loose_files(top / tests[0])
    return _source(top, train, held, size)


def _source(
    top: Path, train: dict[str, list[str]], held: dict[str, list[str]] | None, size: tuple[int, int] | None
) -> Source:
    files = [path for group in (train, held or {}) for paths in group.values() for path in paths]
    form = common_form(map(peek_image, files), size)
    return Source(
        name=top.resolve().name,
        classes=tuple(train),
        train=_images(train, form),
        test=None if held is None else _images(held, form),
    )


def _existing(folder: str | os.PathLike[str], what: str = "a folder of class folders") -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        got = f"the file {str(path)!r}" if path.exists() else f"{str(path)!r}, which does not exist"
        raise InputError(what, got, "check the path")
    return path


def _splits(top: Path) -> tuple[Path, Path | None]:
    """Where the class folders for training and for testing are."""
    names = [entry.name for entry in _subfolders(top)]
    tests = [name for name in TEST_NAMES if name in names]
    if TRAIN_NAME in names:
        train = top / TRAIN_NAME
        # A class may be called "train" (beside "bus"); a split holds folders, a class holds images.
        if tests or not any(map(_is_image, os.listdir(train))):
            return train, top / tests[0] if tests else None
    if names and len(tests) == len(names):
        raise InputError(
            f"a folder '{TRAIN_NAME}' beside {listed(tests)}",
            f"none in {str(top)!r}",
            "add it, or point at the folder which holds the class folders",
        )
    return top, None


def _class_files(folder: Path) -> dict[str, list[str]]:
    """Image files by class, both in order."""
    found: dict[str, list[str]] = {}
    for entry in _subfolders(folder):
        # One system spells an accented letter as one code, another as two: the same class all the same.
        found.setdefault(unicodedata.normalize("NFC", entry.name), []).extend(_image_files(entry.path))
    if not any(found.values()):
        loose = sum(map(_is_image, os.listdir(folder)))
        got = f"{loose} images directly in {str(folder)!r}" if loose else f"no image below {str(folder)!r}"
        remedy = f"sort them into class folders, or {_WITHOUT}" if loose else f"images end in {_endings()}"
        raise InputError("a folder with one folder of images per class", got, remedy)
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise InputError(
            "at least one image in every class folder",
            f"none in {listed(empty)} of {str(folder)!r}",
            f"add images (they end in {_endings()}), or remove the folder",
        )
    if len(found) < 2:
        raise InputError(
            "at least two class folders",
            f"only {listed(found)} in {str(folder)!r}",
            f"point at the folder which holds one folder per class, or {_WITHOUT}",
        )
    return {name: sorted(found[name]) for name in sorted(found)}


def _loose_files(folder: Path, leave: Sequence[str] = ()) -> dict[str, list[str]]:
    """Image files at any depth as one class, in order, apart from those in the subfolders to ``leave``."""
    found = [str(folder / name) for name in os.listdir(folder) if _is_image(name) and (folder / name).is_file()]
    for entry in _subfolders(folder):
        if entry.name not in leave:
            found += _image_files(entry.path)
    if not found:
        besides = f" besides those in {listed(leave)}" if leave else ""
        raise InputError("images", f"none below {str(folder)!r}{besides}", f"images end in {_endings()}")
    return {UNLABELLED: sorted(found)}


def _subfolders(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if entry.is_dir() and not _hidden(entry.name)), key=lambda entry: entry.name
        )


def _image_files(folder: str) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [os.path.join(place, name) for name in files if _is_image(name)]
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__", "@eaDir")  # what archivers and servers leave


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _endings() -> str:
    return ", ".join(sorted(SUFFIXES))


def _images(files: dict[str, list[str]], form: tuple[tuple[int, int], str]) -> FileImages:
    size, mode = form
    labels = torch.tensor([label for label, paths in enumerate(files.values()) for _ in paths])
    return FileImages([path for paths in files.values() for path in paths], labels, size=size, mode=mode)
