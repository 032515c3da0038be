"""A set packed into one tar archive, decoded straight from the stream once and then kept as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
import warnings
import zlib
from pathlib import Path, PurePosixPath

import torch

from scrimp.data.foreign import DatasetImages
from scrimp.data.images import Progress, TensorImages, processors, read_all
from scrimp.data.source import Source, same_classes
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

_SPLITS = ("train", "test")
_LAYOUT = 1  # of the cached file; raised when pixels or names would come out otherwise


def packed_source(archive: Path, *, name: str, size: tuple[int, int], progress: Progress | None = None) -> Source:
    """Read ``train/CLASS/*`` and ``test/CLASS/*`` from a tar archive of any compression, as RGB.

    The decoded set is kept in `cache_folder`, under a name made from the archive's content, so that the next call only
    maps it. A cached file that is damaged is made again.

    Args:
        size: height and width in pixels.

    Raises:
        InputError: a damaged archive or image, or no such folders in it.
    """
    key = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    cached = cache_folder() / f"{name}-{size[0]}x{size[1]}-{key}-{_LAYOUT}.safetensors"
    return _cached(cached, name) or _decoded(archive, cached, name, size, progress)


def cache_folder() -> Path:
    """$SCRIMP_CACHE, else ``~/.cache/scrimp``."""
    from_environment = os.environ.get("SCRIMP_CACHE")
    return Path(from_environment).expanduser() if from_environment else Path.home() / ".cache" / "scrimp"


def _cached(path: Path, name: str) -> Source | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            classes = tuple(json.loads(file.metadata()["classes"]))
            train, test = (
                TensorImages(file.get_tensor(f"{split}_images"), file.get_tensor(f"{split}_labels"))
                for split in _SPLITS
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return Source(name, classes, train, test)


def _decoded(archive: Path, cached: Path, name: str, size: tuple[int, int], progress: Progress | None) -> Source:
    from safetensors.torch import save

    members = _members(archive)
    names = {split: {label for part, label, _, _ in members if part == split} for split in _SPLITS}
    same_classes(names["train"], names["test"])
    classes = tuple(sorted(names["train"]))
    labels = torch.tensor([classes.index(label) for _, label, _, _ in members], dtype=torch.int64)
    rows = [({"path": path, "bytes": content},) for _, _, path, content in members]
    images = DatasetImages(rows, labels, size=size, mode="RGB")
    images.threads = processors()
    pixels, _ = read_all(images, progress=progress)
    assert pixels is not None
    count = sum(split == "train" for split, _, _, _ in members)
    parts = {
        "train": TensorImages(pixels[:count], labels[:count]),
        "test": TensorImages(pixels[count:], labels[count:]),
    }
    tensors = {f"{split}_images": part.pixels for split, part in parts.items()}
    tensors |= {f"{split}_labels": part.labels for split, part in parts.items()}
    try:
        write_atomic(cached, save(tensors, {"classes": json.dumps(classes)}))
    except OSError as error:
        warnings.warn(f"{archive.name} is decoded anew each time: {cached} cannot be written ({error})", stacklevel=2)
    return Source(name, classes, parts["train"], parts["test"])


def _members(archive: Path) -> list[tuple[str, str, str, bytes]]:
    """Split, class, path and bytes of every image: the training ones first, else in the archive's order."""
    found = []
    try:
        # Not tarfile's own streaming ("r|*"): that takes a truncated archive for a short one.
        with tarfile.open(archive) as stream:
            for member in stream:
                parts = PurePosixPath(member.name).parts
                content = stream.extractfile(member) if member.isfile() else None
                if content is not None and len(parts) == 3 and parts[0] in _SPLITS:
                    found.append((parts[0], parts[1], member.name, content.read()))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError("a whole tar archive", f"{str(archive)!r} ({reason})", "fetch it again") from error
    if not found:
        raise InputError("train/CLASS/ and test/CLASS/ in the archive", f"none in {str(archive)!r}", "pack it so")
    return sorted(found, key=lambda member: _SPLITS.index(member[0]))
