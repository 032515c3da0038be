"""Decoded pixels kept in memory, up to a number of bytes that all images of a process share."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import numpy as np
import numpy.typing as npt

from scrimp.primitives.errors import InputError

Pixels = npt.NDArray[np.uint8]
"""uint8 [height, width, channels]."""

DEFAULT_BYTES = 128 * 2**20


class PixelCache:
    """Tiles and decoded images, the least recently used dropped first. Threads and forked processes may use it.

    Pickled, it arrives empty with the same limit: images that shared one still share one in a loader's worker.

    Args:
        max_bytes: bytes of pixels kept. An entry larger than that is kept alone, until the next one comes: whoever
            made it holds that memory anyhow, and a large file would be decoded again for every patch without.

    Raises:
        InputError: ``max_bytes`` is negative or no whole number.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise InputError("a number of bytes from 0 on", repr(max_bytes), "pass for instance 64 * 2**20")
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Pixels] = OrderedDict()
        self._nbytes = 0
        self._lock, self._process = Lock(), os.getpid()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.max_bytes,)

    @property
    def nbytes(self) -> int:
        """Bytes of pixels held now."""
        return self._nbytes

    def find(self, key: Hashable) -> Pixels | None:
        """What is kept under ``key``, or ``None``."""
        self._survive_fork()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def get(self, key: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """What is kept under ``key``, else what ``make()`` gives, then kept. Do not write to it.

        Two threads that miss at once both make it: no thread waits for another's disk.
        """
        found = self.find(key)
        if found is None:
            found = make()
            self._keep(key, found)
        return found

    def _keep(self, key: Hashable, pixels: Pixels) -> None:
        with self._lock:
            old = self._kept.pop(key, None)
            self._nbytes += pixels.nbytes - (0 if old is None else old.nbytes)
            self._kept[key] = pixels
            while self._nbytes > self.max_bytes and (len(self._kept) > 1 or self.max_bytes == 0):
                self._nbytes -= self._kept.popitem(last=False)[1].nbytes

    def _survive_fork(self) -> None:
        """A lock that another thread held at the fork would stay locked in the child for ever."""
        if self._process != os.getpid():
            self._kept = OrderedDict(self._kept)
            self._nbytes = sum(pixels.nbytes for pixels in self._kept.values())
            self._lock, self._process = Lock(), os.getpid()


SHARED = PixelCache()
"""What images use that were opened without a cache of their own."""
