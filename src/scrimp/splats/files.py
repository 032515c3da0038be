"""Scenes from and to files of any format: by their content when read, by the name's ending when written."""

from __future__ import annotations

import importlib
import inspect
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.splats.checks import settle_bad
from scrimp.splats.scene import Splats

_WRITERS = {
    ".compressed.ply": "compressed_ply:write_compressed_ply",
    ".ply": "ply:write_ply",
    ".splat": "splat_file:write_splat",
    ".spz": "spz:write_spz",
    ".sog": "sog_write:write_sog",
    ".sgs": "container:encode",
}
"""The first ending that fits. Modules are imported when a file of theirs comes."""
ENDINGS = tuple(_WRITERS)
"""Of the formats that can be written."""
_FOLDERS = {
    "lod-meta.json": "sog_read:read_sog",
    "meta.json": "sog_read:read_sog",
    "kmeans_inds.bin": "kmeans_folder:read_kmeans_folder",
}
"""By a file that only such a folder has."""
_KSPLAT = b"\0\1\0\0"  # version 0.1, two unused bytes


def read(path: str | os.PathLike[str], *, on_bad: str = "refuse") -> Splats:
    """Read a scene: .ply of 3DGS or PlayCanvas' compressed one, .splat, .ksplat, .spz, .sog, or this library's own.

    Files are told by their content; only .splat and .ksplat, which have no mark, by their names. A folder is an
    unpacked SOG (meta.json or lod-meta.json), one of k-means codebooks, or what 3DGS writes, of which the last
    iteration is read.

    Args:
        path: file or folder.
        on_bad: what to do about Gaussians with NaN, infinity or a quaternion of length 0: "refuse" the file, "clamp"
            infinite opacities and sizes of 0 to the finite limits of `scrimp.splats.activations` and refuse others,
            "drop" those Gaussians, or "keep" them.

    Raises:
        InputError: no such file, none of these formats, damaged, or with Gaussians to refuse.
    """
    place = Path(path)
    if not place.exists():
        raise InputError("a scene of splats", f"{place}, which is absent", "check the path")
    found = _read_folder(place) if place.is_dir() else _read_file(place)
    return settle_bad(found, str(place), on_bad)


def write(splats: Splats, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a scene, whole or not at all, in the format of the name's ending, one of `ENDINGS`.

    Every Gaussian is written, unseen ones too. Formats that compress write them in an order of their own.

    Args:
        options: those of the format's own function, such as ``version`` of `scrimp.splats.spz.write_spz`, or
            ``prune=True`` of `scrimp.splats.container.encode`.

    Returns:
        The path.

    Raises:
        InputError: another ending, an option that the format has not, or what the format refuses.
    """
    place = Path(path)
    ending = next((ending for ending in ENDINGS if place.name.lower().endswith(ending)), None)
    if ending is None:
        raise InputError(f"a name that ends with one of: {', '.join(ENDINGS)}", place.name, "choose a format by it")
    make = _function(_WRITERS[ending])
    known = list(inspect.signature(make).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"options of {ending}: {', '.join(known) or 'none'}", unknown[0], "leave it out")
    return write_atomic(place, make(splats, **options))


def _read_file(path: Path) -> Splats:
    with path.open("rb") as file:
        head = file.read(8)
    name = path.name.lower()
    if head.startswith(b"PK\3\4"):
        return _reader("sog_read:read_sog")(path)
    if head.startswith((b"ply\n", b"ply\r\n")):
        return _read_ply(path)
    if head == b"SCRIMPGS":
        return _reader("container:decode")(path.read_bytes())
    if name.endswith(".splat"):  # its first bytes may be any number's
        return _reader("splat_file:read_splat")(path.read_bytes(), str(path))
    if name.endswith(".ksplat") or head.startswith(_KSPLAT):
        return _reader("ksplat:read_ksplat")(path.read_bytes(), str(path))
    if name.endswith(".spz") or head.startswith((b"NGSP", b"\x1f\x8b\x08")):
        return _reader("spz:read_spz")(path.read_bytes(), str(path))
    if head.lstrip().startswith(b"{"):
        return _reader("sog_read:read_sog")(path)
    formats = ".ply, .splat, .ksplat, .spz, .sog, .sgs"
    raise InputError(f"a scene of splats, one of {formats}", f"{path}, whose bytes are of none", "check the file")


def _read_ply(path: Path) -> Splats:
    """Through a map, as these files are the large ones: what is read is copied once, into the tensors."""
    from scrimp.splats.compressed_ply import is_compressed, read_compressed_ply
    from scrimp.splats.ply import read_ply
    from scrimp.splats.ply_header import parse_header

    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return (read_compressed_ply if is_compressed(parse_header(data, str(path))) else read_ply)(data, str(path))


def _read_folder(folder: Path) -> Splats:
    for mark, reader in _FOLDERS.items():
        if (folder / mark).is_file():
            return _reader(reader)(folder)
    if (folder / "point_cloud.ply").is_file():
        return _read_file(folder / "point_cloud.ply")
    iterations = [
        (int(place.name.removeprefix("iteration_")), place)
        for place in (folder / "point_cloud").glob("iteration_*")
        if place.name.removeprefix("iteration_").isdecimal() and place.is_dir()
    ]
    if not iterations:
        marks = ", ".join([*_FOLDERS, "point_cloud"])
        raise InputError("a folder that is a scene", f"{folder} with none of {marks}", "name a file")
    return _read_folder(max(iterations)[1])


def _reader(place: str) -> Callable[..., Splats]:
    return _function(place)


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"scrimp.splats.{module}"), name)
    return function
