"""Labels as people use them further: a CSV, class folders, and the classifier."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from scrimp.jobs.label_data import LabelPool
from scrimp.jobs.label_server import picture
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.represent.linear import LinearProbe

LABELS = "labels.csv"
LABELLED = "labelled"
HEAD = "head.safetensors"


def check_export(how: str, pool: LabelPool, classes: Sequence[str]) -> None:
    """Refuse links to images that are no files, and classes whose folders could not be told apart or found again.

    Raises:
        InputError: they are none, or a class by name.
    """
    if how != "none":
        folders_of(classes)
    if how == "symlink" and pool.paths is None:
        raise InputError("a folder of images for --export-folders symlink", pool.data.name, "use copy")


def folders_of(classes: Sequence[str]) -> list[str]:
    """Names of the classes' folders: slashes become hyphens.

    Raises:
        InputError: two would be one, or one would be hidden.
    """
    found = [name.replace("/", "-").replace("\\", "-") for name in classes]
    for name, folder in zip(classes, found, strict=True):
        if folder.startswith(".") or found.count(folder) > 1:
            raise InputError("classes that can be folders", repr(name), "leave --export-folders out, or rename it")
    return found


def write_labels(rows: Sequence[dict[str, Any]], names: Sequence[str], classes: Sequence[str], path: Path) -> Path:
    """The CSV: ``image,label,round,audit,annotator``, an image a line; `scrimp label --oracle` reads it.

    ``rows`` are `Session.rows`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", "round", "audit", "annotator"))
    for row in rows:
        found = (names[row["image"]], classes[row["class"]], row["round"], int(row["audit"]), row["who"])
        writer.writerow(found)
    return write_atomic(path, text.getvalue())


def write_folders(
    rows: Sequence[dict[str, Any]], pool: LabelPool, classes: Sequence[str], *, folder: Path, links: bool
) -> Path:
    """Class folders of the labelled images, each under the name it has below the data's folder.

    Made beside and then renamed, so that ``folder`` is never half of it; an earlier one is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    homes = folders_of(classes)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.chmod(beside, 0o755)
    try:
        for row in rows:
            target = beside / homes[row["class"]] / PurePosixPath(pool.names[row["image"]])
            target.parent.mkdir(parents=True, exist_ok=True)
            if pool.paths is None:
                target.write_bytes(picture(pool.data.train, None, row["image"])[1])
            elif links:
                target.symlink_to(Path(pool.paths[row["image"]]).resolve())
            else:
                shutil.copy2(pool.paths[row["image"]], target)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        wanted = f"room for class folders in {folder.parent}"
        raise InputError(wanted, f"{error}", "leave --export-folders out") from error
    return folder


def write_head(probe: LinearProbe, classes: Sequence[str], encoder: str, path: Path) -> int:
    """The linear classifier, for features of unit length made by ``encoder``; returns the bytes of the file."""
    content = pack_weights(
        {key: getattr(probe, key).contiguous() for key in ("mean", "std", "weight", "bias")},
        {"format": "pt", "kind": "linear-probe", "encoder": encoder, "classes": "\n".join(classes)},
    )
    write_atomic(path, content)
    return len(content)
