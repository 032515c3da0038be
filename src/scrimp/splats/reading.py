"""What every reader of scenes shares: bytes taken one after another, never more than there are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from scrimp.primitives.errors import InputError
from scrimp.splats.scene import Splats


def damaged(format: str, name: str, what: str) -> InputError:
    """The error for bytes that are not what their format asks for.

    Args:
        format: as a person calls it, such as ``".spz"``.
        name: of the file.
        what: is wrong, such as ``"7 bytes at offset 16, where 32 are needed"``.
    """
    return InputError(f"a whole {format} file", f"{name}: {what}", "copy or export it again")


class Cursor:
    """Takes a file's bytes from front to back, without copying them.

    Attributes:
        offset: of the next byte.

    Raises:
        InputError: from every method that is asked for more than there is.
    """

    def __init__(self, data: bytes | memoryview, *, format: str, name: str) -> None:
        self._data = memoryview(data)
        self.format, self.name, self.offset = format, name, 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self.offset

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if not 0 <= count <= self.left:
            raise self.wrong(f"{self.left} bytes at offset {self.offset}, where {count} are needed")
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def array(self, dtype: Any, *shape: int) -> np.ndarray:
        """The next numbers as an array of this shape, read-only; its size is checked before anything is made of it."""
        kind, count = np.dtype(dtype), 1
        for side in shape:  # Python's own whole numbers: a claimed size must not wrap around
            count *= int(side)
        return np.frombuffer(self.take(count * kind.itemsize), kind).reshape(shape)

    def number(self, dtype: Any) -> Any:
        """The next single number, as Python's int or float."""
        return self.array(dtype, 1)[0].item()

    def end(self) -> None:
        """Refuses bytes left over."""
        if self.left:
            raise self.wrong(f"{self.left} bytes too many at offset {self.offset}")

    def wrong(self, what: str) -> InputError:
        """`damaged` for this file."""
        return damaged(self.format, self.name, what)


def inflate(data: bytes | memoryview, limit: int, *, format: str, name: str, raw: bool = False) -> bytes:
    """Decompress gzip or zlib (RFC 1952, 1950), or with ``raw`` deflate without either's header (RFC 1951).

    Args:
        limit: most bytes that may come out; no more than this is ever held.

    Raises:
        InputError: damaged, truncated, or more than ``limit`` bytes.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    try:
        found = stream.decompress(data, max(limit, 0) + 1)
    except zlib.error as error:
        raise damaged(format, name, f"its compressed bytes cannot be read ({error})") from error
    if len(found) > limit:
        raise damaged(format, name, f"more than {limit} bytes once decompressed")
    if not stream.eof:
        raise damaged(format, name, "its compressed bytes end too soon")
    return found


def splats_of(arrays: Mapping[str, np.ndarray]) -> Splats:
    """A scene of arrays by the names of its tensors, which share their memory."""
    return Splats(**{field: torch.from_numpy(values) for field, values in arrays.items()}, extra={}, antialiased=False)
