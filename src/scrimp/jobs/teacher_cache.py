"""Features of a frozen teacher for a few views of every image, in RAM or in a file that says what made it.

A file ``NAME.npy``, [views, images, dim], and beside it ``NAME.json``: what made it, how many rows are finished, view
after view, and their CRC-32. Rows beyond are never read, so a kill at any moment leaves nothing that is misread.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_json

_CHUNK = 2**24  # bytes looked at a time


class TeacherCache:
    """Rows of features, appended in order and read in any.

    Args:
        shape: views, images, numbers a feature vector has.
        dtype: ``"float16"`` or ``"float32"``.
        path: the .npy file; made, or taken up where its index says it is of the same making. RAM where omitted.
        about: what made the features, as JSON holds it.
        writes: open to append; else only to read, unverified, as the processes do that did not write it.

    Raises:
        InputError: a file that is damaged or of another making, or no room for it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: str,
        *,
        path: Path | None = None,
        about: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.shape, self.dtype, self.path, self.about = shape, np.dtype(dtype), path, about or {}
        self.finished, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self._crc = 0
        self._file = self._opened(writes)
        self._rows = self._file.reshape(shape[0] * shape[1], shape[2])
        if path is not None and writes:
            self._verify()
            if not index_of(path).is_file():  # a new file is not to be made anew by the next who looks for it
                self.save_()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the finished rows."""
        return self.finished * self.shape[2] * self.dtype.itemsize

    def append_(self, features: Tensor) -> None:
        """Take the next rows, float [n, dim]; they count on disk from the next `save_` on."""
        end = self.finished + len(features)
        rows = features.detach().cpu().numpy().astype(self.dtype)
        self._rows[self.finished : end] = rows
        self._crc, self.finished = zlib.crc32(rows.tobytes(), self._crc), end

    def read(self, view: int, rows: Tensor, *, device: torch.device | None = None) -> Tensor:
        """The features of one view of these images (int64 [n], on the CPU), float32 [n, dim].

        Raises:
            InputError: a view that is not finished.
        """
        if (view + 1) * self.shape[1] > self.finished:
            whole = self.finished // self.shape[1]
            raise InputError(f"one of the {whole} views that are finished", f"view {view}", "finish it first")
        found = np.asarray(self._file[view][rows.numpy()])
        return torch.from_numpy(found).to(device).float()

    def save_(self) -> None:
        """Make all rows so far count: first the data reaches the disk, then the index that vouches for it."""
        if self.path is None:
            return
        cast(np.memmap[Any, Any], self._file).flush()
        index = {
            "about": self.about,
            "finished": self.finished,
            "crc32": self._crc,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        write_json(index_of(self.path), index)

    def _opened(self, writes: bool) -> np.ndarray[Any, Any]:
        if self.path is None:
            return np.zeros(self.shape, self.dtype)
        index = read_index(self.path, self.about)
        if index is None:
            return self._made()
        self.finished, self._crc = index["finished"], index["crc32"]
        self.seconds, self.cpu_seconds = index["seconds"], index["cpu_seconds"]
        try:
            file = open_memmap(self.path, mode="r+" if writes else "r")
        except (OSError, ValueError) as error:
            raise damaged(self.path, str(error).splitlines()[0]) from error
        if (
            file.shape != self.shape
            or file.dtype != self.dtype
            or not 0 <= self.finished <= self.shape[0] * self.shape[1]
        ):
            raise damaged(self.path, "its size differs")
        return file

    def _made(self) -> np.ndarray[Any, Any]:
        """A new file: sparse where the file system can, so the views that no run needs take no room."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needed = int(np.prod(self.shape)) * self.dtype.itemsize
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise InputError(
                f"{needed / 1e9:.3g} GB of room for the teacher's features in {self.path.parent}",
                f"{free / 1e9:.3g} GB",
                "lower --cache-views, pass another --cache-folder, or --cache none",
            )
        return open_memmap(self.path, mode="w+", dtype=self.dtype, shape=self.shape)

    def _verify(self) -> None:
        """Refuse finished rows that are not what was written."""
        crc, step = 0, max(1, _CHUNK // (self.shape[2] * self.dtype.itemsize))
        for start in range(0, self.finished, step):
            crc = zlib.crc32(self._rows[start : min(start + step, self.finished)].tobytes(), crc)
        if crc != self._crc:
            assert self.path is not None
            raise damaged(self.path, "its CRC-32 differs")


def index_of(path: Path) -> Path:
    """The index of a file of features."""
    return path.with_suffix(".json")


def read_index(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the index says, if there is one.

    Raises:
        InputError: it is damaged, or the features are of another making than ``about``.
    """
    file = index_of(path)
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_bytes())
        found = {key: index["about"].get(key) for key in about}
        numbers = [index[key] for key in ("finished", "crc32", "seconds", "cpu_seconds")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, "no whole index") from error
    if not all(isinstance(number, (int, float)) for number in numbers) or not isinstance(index["finished"], int):
        raise damaged(file, "no whole index")
    for key, value in about.items():
        if found[key] != value:
            got = f"{_short(found[key])} in {file}"
            raise InputError(f"features made with {key} {_short(value)}", got, "pass another --cache-folder")
    return cast(dict[str, Any], index)


def damaged(path: Path, how: str) -> InputError:
    """The error about a file that cannot be trusted."""
    return InputError("whole features of a teacher", f"{path}, damaged ({how})", "delete it and its index")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
