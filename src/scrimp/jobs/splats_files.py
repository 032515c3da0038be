"""`scrimp splats decompress`: a scene of any format as one of any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrimp.jobs.splats_config import SplatsDecompressConfig
from scrimp.primitives.errors import InputError
from scrimp.splats.files import ENDINGS, read, write

_TAKES_LOSSY = (".compressed.ply", ".splat", ".spz", ".sog")


@dataclass(frozen=True)
class Converted:
    """What was written: file, Gaussians, degree of their harmonics, bytes before (None of a folder) and after."""

    path: Path
    gaussians: int
    degree: int
    bytes_before: int | None
    bytes_after: int


def splats_decompress(config: SplatsDecompressConfig) -> Converted:
    """Convert; the file is written whole or not at all, and no file is overwritten.

    Raises:
        InputError: the scene cannot be read, the file exists, or it would lose what its format has no place for and
            ``config.lossy`` does not allow that.
    """
    out = config.out or beside(config.file, ".ply")
    refuse_existing(out)
    ending = next((ending for ending in ENDINGS if out.name.lower().endswith(ending)), None)
    if ending is None:
        raise InputError(f"an --out that ends with one of: {', '.join(ENDINGS)}", out.name, "choose a format by it")
    splats = read(config.file, on_bad=config.on_bad)
    options: dict[str, Any] = {"lossy": config.lossy} if ending in _TAKES_LOSSY else {}
    try:
        write(splats, out, **options)
    except InputError as error:
        remedy = error.remedy.replace("lossy=True", "--lossy")
        raise InputError(error.expected, error.got, remedy) from error
    size = config.file.stat().st_size if config.file.is_file() else None
    return Converted(out, len(splats), splats.degree, size, out.stat().st_size)


def beside(path: Path, ending: str) -> Path:
    """A scene's name with another ending."""
    name = path.resolve().name
    known = next((known for known in (*ENDINGS, ".ksplat") if name.lower().endswith(known)), "")
    return path.resolve().parent / f"{name[: len(name) - len(known)]}{ending}"


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        InputError: the file is there.
    """
    if out.exists():
        raise InputError("a new file for --out", f"{out}", "pass another --out")
