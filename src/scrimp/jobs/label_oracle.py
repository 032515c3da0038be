"""Labels that are known already: the data set's own, those of a folder of class folders, or of a CSV."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scrimp.data.folders import folder_source
from scrimp.jobs.label_config import OWN, LabelConfig, check_classes
from scrimp.jobs.label_data import LabelPool
from scrimp.primitives.errors import InputError

_IMAGE, _LABEL = ("image", "file", "filename", "path"), ("label", "class")


@dataclass(frozen=True)
class Oracle:
    """Who is asked.

    Attributes:
        classes: their names.
        labels: of each image the number of its class, or ``None`` where it is not known; then the image is skipped.
    """

    classes: tuple[str, ...]
    labels: tuple[int | None, ...]


def read_oracle(config: LabelConfig, pool: LabelPool) -> Oracle:
    """The labels that ``config.oracle`` names, brought to the images.

    Raises:
        InputError: no such file or folder, not readable, of other images or other classes, or contradicting itself.
    """
    assert config.oracle is not None
    if config.oracle == OWN:
        return Oracle(pool.data.classes, tuple(pool.data.train.labels.tolist()))
    path = Path(config.oracle).expanduser()
    if not path.exists():
        raise InputError("data, a folder or a CSV for --oracle", f"{path}, which does not exist", "check the path")
    said = dict(_once(_of_folder(path) if path.is_dir() else _of_csv(path), path))
    classes = config.classes or tuple(sorted(set(said.values())))
    strange = sorted(set(said.values()) - set(classes))
    if strange:
        raise InputError(f"labels of {', '.join(classes[:5])}", f"{strange[0]!r} in {path}", "correct --classes")
    if len(classes) < 2:
        raise InputError("labels of at least two classes", f"{len(classes)} in {path}", "pass another --oracle")
    check_classes(classes)
    found = _matched(pool.names, said)
    if not any(found):
        got = f"{len(said)} of others in {path}, such as {next(iter(said), '')!r}"
        raise InputError(f"labels of the images, such as {pool.names[0]!r}", got, "name images as below DATA")
    numbers = {name: number for number, name in enumerate(classes)}
    return Oracle(classes, tuple(None if item is None else numbers[item] for item in found))


def _matched(names: Sequence[str], said: dict[str, str]) -> list[str | None]:
    """The label of each image: by its path below the folder, or by the file's name where only one has it."""
    short = Counter(PurePosixPath(name).name for name in names)
    theirs = Counter(PurePosixPath(name).name for name in said)
    by_file = {PurePosixPath(name).name: label for name, label in said.items()}
    found: list[str | None] = []
    for name in names:
        file = PurePosixPath(name).name
        alone = short[file] == 1 and theirs[file] == 1
        found.append(said.get(name, by_file[file] if alone else None))
    return found


def _of_folder(path: Path) -> Iterator[tuple[str, str]]:
    source = folder_source(path, size=(8, 8))  # of a train folder where there is one
    paths = source.train.paths  # type: ignore[attr-defined]  # the images of a folder are files
    for file, number in zip(paths, source.train.labels.tolist(), strict=True):
        name = source.classes[number]
        parts = Path(os.path.relpath(file, path)).parts
        # Class folders keep the form of letters they have on disk, classes the composed one.
        below = next(place for place, part in enumerate(parts) if unicodedata.normalize("NFC", part) == name)
        yield PurePosixPath(*parts[below + 1 :]).as_posix(), name


def _of_csv(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            head = [item.strip().lower() for item in next(rows, [])]
            image, label = (_place(head, known) for known in (_IMAGE, _LABEL))
            if min(image, label) < 0:
                got = f"the columns {', '.join(head)[:80] or 'of nothing'} in {path}"
                raise InputError("the columns image and label", got, "add a first line: image,label")
            for row in rows:
                if len(row) > max(image, label) and row[label].strip():
                    yield PurePosixPath(row[image].strip().replace("\\", "/")).as_posix(), row[label].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("a CSV in UTF-8", f"{path} ({str(error).splitlines()[0]})", "check the file") from error


def _place(head: list[str], known: Sequence[str]) -> int:
    return next((head.index(name) for name in known if name in head), -1)


def _once(pairs: Iterator[tuple[str, str]], path: Path) -> Iterator[tuple[str, str]]:
    """The same, and an error where an image comes with two labels."""
    seen: dict[str, str] = {}
    for name, label in pairs:
        if seen.setdefault(name, label) != label:
            raise InputError("one label an image", f"{seen[name]!r} and {label!r} for {name} in {path}", "correct it")
        yield name, label
