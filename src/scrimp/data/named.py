"""Data sets by name: the built-in sample, and well-known sets from the places where they usually lie."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import pickle
import socket
import sys
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.data.images import Progress, TensorImages
from scrimp.data.packed import cache_folder, packed_source
from scrimp.data.source import Source
from scrimp.primitives.errors import InputError

BUILTIN = "builtin"
NAMED = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Our names, and torchvision's."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CIFAR10_PACKED = "cifar10-jpeg.tar.xz"

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PATIENCE = 20.0  # seconds without an answer after which a download is given up


def builtin_source() -> Source:
    """12,000 training and 2,000 test images of Fashion-MNIST, 1 x 28 x 28, ten classes (see the licence beside them).

    Raises:
        InputError: the installed file is damaged.
    """
    path = resources.files("scrimp.data") / "builtin" / "fashion-mnist-sample.npz.xz"
    try:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False) as archive:
            train, test = (
                _grey_images(archive[f"{split}_images"], archive[f"{split}_labels"]) for split in ("train", "test")
            )
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError) as error:
        raise InputError("the whole built-in data set", f"{path} ({error})", "install scrimp again") from error
    return Source("fashion-mnist-sample", _FASHION_CLASSES, train, test)


def named_source(name: str, root: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Source:
    """Find a well-known set: in torchvision's folder, in Debian's, as one packed file, or by torchvision's download.

    Args:
        name: a key of `NAMED`.
        root: torchvision's root folder, where ``cifar10-jpeg.tar.xz`` may lie too; see `data_root` when not given.
        progress: called while a packed set is decoded for the first time.

    Raises:
        InputError: it is in none of these places and cannot be downloaded; or what is there is damaged.
    """
    folder = data_root(root)
    found = _torchvision_source(name, folder, download=False)
    if found is None and name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        found = _idx_source(name, DEBIAN_FASHION_MNIST)
    if found is None and name == "cifar10" and (folder / CIFAR10_PACKED).is_file():
        found = packed_source(folder / CIFAR10_PACKED, name="cifar10-jpeg", size=(32, 32), progress=progress)
    return found or _downloaded(name, folder)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """``root``, else $SCRIMP_DATA, else ``data`` in `cache_folder`."""
    if root is not None:
        return Path(root).expanduser()
    from_environment = os.environ.get("SCRIMP_DATA")
    return Path(from_environment).expanduser() if from_environment else cache_folder() / "data"


def _grey_images(pixels: np.ndarray, labels: np.ndarray) -> TensorImages:
    return TensorImages(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long())


def _torchvision_source(name: str, folder: Path, *, download: bool) -> Source | None:
    """torchvision's own copy, or ``None`` when it has none (and may not download one)."""
    from torchvision import datasets

    kind = getattr(datasets, NAMED[name])
    try:
        parts = [kind(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, ValueError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        if download:
            raise
        if "not found" in str(error):  # how torchvision says that it has no files
            return None
        raise InputError(
            f"whole files of {name}", f"damaged ones in {str(folder)!r}", "delete and fetch them"
        ) from error
    train, test = (TensorImages(_channels_first(part.data), torch.as_tensor(part.targets)) for part in parts)
    return Source(name, tuple(str(item) for item in parts[0].classes), train, test)


def _channels_first(data: Any) -> Tensor:
    """torchvision keeps MNIST as a tensor [N, H, W] and CIFAR as an array [N, H, W, 3]."""
    pixels = torch.as_tensor(data)
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _idx_source(name: str, folder: Path) -> Source:
    """Gzipped IDX files, as Fashion-MNIST is published and Debian ships it."""
    try:
        train, test = (
            _grey_images(
                _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
                _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
            )
            for prefix in ("train", "t10k")
        )
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"whole files of {name}", f"damaged ones in {str(folder)!r}", "install them again") from error
    return Source(name, _FASHION_CLASSES, train, test)


def _read_idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(shape.tolist())).copy()


def _downloaded(name: str, folder: Path) -> Source:
    try:
        with _patience():
            found = _torchvision_source(name, folder, download=True)
    except (RuntimeError, OSError, ValueError, EOFError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        packed = f" or {CIFAR10_PACKED}" if name == "cifar10" else ""
        debian = "install Debian's dataset-fashion-mnist, or " if name == "fashion-mnist" else ""
        raise InputError(
            f"the data set {name}",
            f"none in {str(folder)!r}, and no download ({reason})",
            f"{debian}put torchvision's files{packed} there, or point SCRIMP_DATA at the folder that has them, "
            "or pass a folder of class folders",
        ) from error
    assert found is not None
    return found


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Behind a silent firewall torchvision would wait for ever; and what it prints is no result of ours."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
