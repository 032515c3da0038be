"""Generated bases and signs that a model's factors share within a budget of bytes."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scrimp.adapt.basis import sign_rows, uniform_rows
from scrimp.primitives.errors import InputError


class Cache:
    """Generated bases and signs, kept up to a number of bytes for all factors of a model together.

    What does not fit is drawn anew each time: nothing is thrown out to make room, because a model reads its factors
    in turn, and a store that keeps the latest would then keep none until it is needed. Entries of a device that was
    not read for many rounds, because the model has left it, are dropped. A copy or a pickle begins empty.

    Compiled code reads the same entries: they are made while it is traced, and are inputs of its graph. What does not
    fit is drawn in the graph. Once an entry is dropped, the code that read it is compiled anew.

    Args:
        bytes: the budget; 0 keeps nothing.

    Raises:
        InputError: a negative budget.
    """

    def __init__(self, *, bytes: int) -> None:
        if bytes < 0:
            raise InputError("a budget of 0 bytes or more", f"{bytes}", "0 keeps nothing")
        self.bytes = bytes
        self.name = str(next(_NUMBERS))
        self.used = 0
        """Bytes kept."""
        self._entries: dict[tuple[Any, ...], Tensor] = {}
        self._places: dict[tuple[Any, ...], str] = {}
        self._read_at: dict[torch.device, int] = {}
        self._reads = 0
        self._lock = threading.Lock()
        _CACHES[self.name] = self

    def signs(self, seed: int, index: int, count: int, *, stream: int, device: torch.device) -> Tensor:
        """What `scrimp.adapt.basis.signs` gives, int8 [count]; not to be changed."""
        return taken(self, "signs", seed, index, count, 1, stream, device).view(count)

    def clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._drop(tuple(self._entries))
            self._read_at.clear()

    def keep(self, kind: str, *arguments: Any) -> Tensor | None:
        """The kept tensor, made if there is room for it; ``None`` where there is not."""
        key, device = (kind, *arguments), arguments[-1]
        self._note(device)
        found = self._entries.get(key)
        if found is not None or not self._has_room(key):
            return found
        with torch.inference_mode(False), torch.no_grad():
            made = _MAKERS[kind](*arguments)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made
                self.used += made.nbytes
            return self._entries[key]

    def place(self, kind: str, *arguments: Any) -> str:
        """The attribute of this object that holds an entry for compiled code; "" where there is no room for it.

        Not the dictionary: a tracer looks at one once, and would miss what is kept while it goes on.
        """
        key = (kind, *arguments)
        kept = self.keep(*key)
        if kept is None:
            return ""
        place = self._places.setdefault(key, f"entry_{len(self._places)}")
        setattr(self, place, kept)
        return place

    def _has_room(self, key: tuple[Any, ...]) -> bool:
        # Under a dispatch mode a tensor may be fake; while a CUDA graph is captured, its memory is the graph's.
        foreign = torch._C._len_torch_dispatch_stack() > 0 or key[-1].type == "meta"
        if foreign or (key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return False
        return self.used + _SIZES[key[0]](*key[1:]) <= self.bytes

    def _note(self, device: torch.device) -> None:
        """Remember that the device is in use, and drop the entries of those that are no longer."""
        self._reads += 1
        self._read_at[device] = self._reads
        if len(self._read_at) > 1:
            oldest = self._reads - 16 * (len(self._entries) + 1)
            with self._lock:
                for other in [other for other, at in self._read_at.items() if at < oldest]:
                    del self._read_at[other]
                    self._drop([key for key in self._entries if key[-1] == other])

    def _drop(self, keys: Iterable[tuple[Any, ...]]) -> None:
        for key in keys:
            self.used -= self._entries.pop(key).nbytes
            if hasattr(self, place := self._places.get(key, "")):
                delattr(self, place)

    def __reduce__(self) -> tuple[Callable[[], Cache], tuple[()]]:
        return functools.partial(Cache, bytes=self.bytes), ()


_CACHES: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def signs_of(seed: int, index: int, count: int, rows: int, stream: int, device: torch.device) -> Tensor:
    return sign_rows(seed, index, count, rows=rows, stream=stream, device=device)


def uniform_of(seed: int, count: int, rows: int, stream: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return uniform_rows(seed, 1, count, rows=rows, stream=stream, dtype=dtype, device=device)


def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(-1)^popcount(t & i), [size, size]."""
    places = torch.arange(size, device=device)
    return (1 - 2 * parity(places[:, None] & places)).to(dtype)


def parity(numbers: Tensor) -> Tensor:
    """Whether an odd number of bits is set, 0 or 1, of int64 below 2**32."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1


_MAKERS: dict[str, Callable[..., Tensor]] = {"signs": signs_of, "uniform": uniform_of, "hadamard": hadamard}
_SIZES: dict[str, Callable[..., int]] = {
    "signs": lambda seed, index, count, rows, *rest: rows * count,
    "uniform": lambda seed, count, rows, stream, dtype, device: rows * count * dtype.itemsize,
    "hadamard": lambda size, dtype, device: size * size * dtype.itemsize,
}


def kept(cache: Cache | None, kind: str, *arguments: Any) -> Tensor | None:
    """What the cache keeps; in traced code a constant of the graph."""
    if cache is None or cache.bytes == 0:
        return None
    if not torch.compiler.is_compiling():
        return cache.keep(kind, *arguments)
    place = _place(cache.name, kind, *arguments)
    return getattr(cache, place) if place else None


def taken(cache: Cache | None, kind: str, *arguments: Any) -> Tensor:
    """What the cache keeps, or made anew."""
    found = kept(cache, kind, *arguments)
    return _MAKERS[kind](*arguments) if found is None else found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place(name: str, kind: str, *arguments: Any) -> str:
    """Asked while code is traced: the attribute of the cache that holds the entry, or nothing where none may."""
    return _CACHES[name].place(kind, *arguments)
