"""Finding the receipts that a person points at."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

STAGES = "stages"
"""Folder of parts of a run whose own receipt counts them in."""


def find_receipts(paths: Iterable[str | os.PathLike[str]]) -> list[Receipt]:
    """Load the receipts of each path: a receipt file, a run folder, or a folder of run folders.

    In a folder, every ``receipt.json`` counts at any depth, and every JSON file below a folder named ``receipts``, in
    the order of their paths. A file reached twice counts once. What is below a folder named `STAGES` is left
    out unless the path itself leads there.

    Raises:
        InputError: a path does not exist, holds no receipt, or holds a damaged one; there is no path at all.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        files |= dict.fromkeys(file.resolve() for file in _files(path))
    if not files:
        raise InputError("a receipt or a run folder", "no path", "name one, such as runs/study")
    return [load_receipt(file) for file in files]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError("a receipt or a run folder", f"{path}, which does not exist", "check the path")
    root = path.resolve()
    found = sorted(
        file for file in root.rglob("*.json") if _is_receipt(file) and STAGES not in file.relative_to(root).parts[:-1]
    )
    if not found:
        raise InputError(
            "a run folder with receipts", f"{path} with none", "pass a folder that a scrimp job finished in"
        )
    return found


def _is_receipt(file: Path) -> bool:
    return file.is_file() and (file.name == "receipt.json" or "receipts" in file.parts[:-1])
