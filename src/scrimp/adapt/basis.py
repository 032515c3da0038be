"""Frozen random numbers that a seed rebuilds bit for bit: the generator ``philox-1`` of `docs/nola-generator.md`.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) encrypts the counter (block, index, stream, kind); the seed is its key.
Integer arithmetic only, and no state: the same numbers on every device, in eager and compiled code, under any torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scrimp.native import load
from scrimp.primitives.errors import InputError

GENERATOR = "philox-1"
MOST = 1 << 34
"""Longest vector: a 32-bit block number counts blocks of four numbers."""

_NUMBERS, _SIGNS = 0, 1
_MASK = 0xFFFF_FFFF
_CHUNK = 1 << 20  # numbers the torch twin makes at once: its 64-bit temporaries take some 100 MB at most


def signs(seed: int, index: int, count: int, *, stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Vector number ``index`` of signs: +1 and -1 with equal chances.

    Args:
        seed: from 0 up, below 2**64: the key.
        index: from 0 up, below 2**32: which vector of the stream.
        count: its length, at most 2**34. A shorter vector is the beginning of a longer one.
        stream: from 0 up, below 2**32; streams and indices are independent of one another, and of `uniform`.
        device: torch's default device where omitted.

    Returns:
        int8 [count].

    Raises:
        InputError: a number outside its range.
    """
    return sign_rows(seed, index, count, rows=1, stream=stream, device=device).view(count)


def uniform(
    seed: int,
    index: int,
    count: int,
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Vector number ``index`` of numbers uniform in [-1, 1): whole multiples of 2**-23, exact in float32.

    Arguments are those of `signs`. Half precision holds the float32 numbers rounded to nearest, ties to even, so that
    1.0 occurs there.

    Returns:
        [count] of ``dtype``.

    Raises:
        InputError: a number outside its range, or a type that is not floating.
    """
    return uniform_rows(seed, index, count, rows=1, stream=stream, device=device, dtype=dtype).view(count)


def basis(
    seed: int,
    index: int,
    shape: Sequence[int],
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Basis number ``index`` of a factor, as the paper draws it: uniform in [-1, 1), row by row.

    It is ``uniform(seed, 1 + index, ...)`` in the given shape, without the factor 1/sqrt(bases).

    Source: NOLA (Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash 2024), equation 2.

    Raises:
        InputError: as of `uniform`.
    """
    return uniform(seed, 1 + index, math.prod(shape), stream=stream, device=device, dtype=dtype).view(tuple(shape))


def sign_rows(
    seed: int, index: int, count: int, *, rows: int, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """`signs` number ``index``, ``index + 1``, ...: int8 [rows, count]."""
    low, high = key_of(seed, index, count, rows, stream)
    return signs_op(low, high, index, stream, rows, count, _device(device))


def uniform_rows(
    seed: int,
    index: int,
    count: int,
    *,
    rows: int,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`uniform` number ``index``, ``index + 1``, ...: [rows, count] of ``dtype``."""
    low, high = key_of(seed, index, count, rows, stream)
    if not dtype.is_floating_point:
        raise InputError("a floating dtype", f"{dtype}", "pass float32, float64, bfloat16 or float16")
    return uniform_op(low, high, index, stream, rows, count, dtype, _device(device))


def key_of(seed: int, index: int, count: int, rows: int, stream: int) -> tuple[int, int]:
    """The halves of the seed, once all is checked."""
    seed = operator.index(seed)  # for torch.compile, too, a constant: 64 unsigned bits are no symbol of its
    if not 0 <= seed < 1 << 64:
        raise InputError("a seed from 0 to 2**64 - 1", f"{seed}", "choose another")
    if index < 0 or rows < 0 or index + rows > 1 << 32:
        raise InputError("vectors numbered from 0 to 2**32 - 1", f"{index} and {rows - 1} more", "use another stream")
    if not 0 <= stream < 1 << 32:
        raise InputError("a stream from 0 to 2**32 - 1", f"{stream}", "choose another")
    if not 0 <= count <= MOST:
        raise InputError(f"a count from 0 to {MOST:,}", f"{count}", "split the vector over several indices")
    return seed & _MASK, seed >> 32


def _device(device: torch.device | str | None) -> torch.device:
    # By way of a tensor: torch.compile does not trace torch.get_default_device.
    return torch.empty(0).device if device is None else torch.device(device)


def _signs(low: int, high: int, index: int, stream: int, rows: int, count: int, device: torch.device) -> Tensor:
    out = torch.empty(rows, count, dtype=torch.int8, device=device)
    native = native_for(device, "philox_signs")
    if native is None:
        return signs_twin_((low, high), index, stream, out)
    native.philox_signs(low, high, index, stream, rows, count, out.data_ptr())
    return out


def _uniform(
    low: int, high: int, index: int, stream: int, rows: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    native = native_for(device, "philox_uniform")
    if native is None:
        return uniform_twin_((low, high), index, stream, torch.empty(rows, count, dtype=dtype, device=device))
    out = torch.empty(rows, count, dtype=torch.float32, device=device)
    native.philox_uniform(low, high, index, stream, rows, count, out.data_ptr())
    return out.to(dtype)


def native_for(device: torch.device, kernel: str) -> Any:
    """The compiled module where it has this kernel and the tensors lie in the processor's memory."""
    native = load() if device.type == "cpu" else None
    return native if native is not None and hasattr(native, kernel) else None


def _signs_fake(low: int, high: int, index: int, stream: int, rows: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(rows, count, dtype=torch.int8, device=device)


def _uniform_fake(
    low: int, high: int, index: int, stream: int, rows: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(rows, count, dtype=dtype, device=device)


def signs_twin_(key: tuple[int, int], index: int, stream: int, out: Tensor) -> Tensor:
    """Fill ``out`` (int8 [rows, count]) with signs by torch alone: the kernel's reference, and its stand-in."""
    shifts = torch.arange(32, device=out.device)
    for part, block, row in _parts(out, 128):
        words = torch.stack(philox((block, index + row, stream, _SIGNS), key), -1)
        bits = ((words[..., None] >> shifts) & 1).flatten(1)
        part.copy_(1 - 2 * bits[:, : part.shape[1]])
    return out


def uniform_twin_(key: tuple[int, int], index: int, stream: int, out: Tensor) -> Tensor:
    """Fill ``out`` ([rows, count], floating) with uniform numbers by torch alone."""
    for part, block, row in _parts(out, 4):
        words = torch.stack(philox((block, index + row, stream, _NUMBERS), key), -1).flatten(1)
        # Bits 31 to 8 as a signed number of 24 bits.
        signed = (words >> 8) - ((words >> 31) << 24)
        part.copy_(signed[:, : part.shape[1]].to(torch.float32) * 2.0**-23)
    return out


def _parts(out: Tensor, per_block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of ``out`` ([rows, count]) of bounded size, with their block numbers [1, blocks] and rows [rows, 1]."""
    if out.device.type == "meta" or out.numel() == 0:
        return
    rows, count = out.shape
    across = min(-(-count // per_block), _CHUNK // per_block)
    down = max(1, _CHUNK // (across * per_block))
    for top in range(0, rows, down):
        row = torch.arange(top, min(top + down, rows), device=out.device)[:, None]
        for first in range(0, -(-count // per_block), across):
            part = out[top : top + down, first * per_block : (first + across) * per_block]
            blocks = -(-part.shape[1] // per_block)
            yield part, torch.arange(first, first + blocks, device=out.device)[None], row


def philox(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a counter of four 32-bit words; each word an int64 tensor or an int, broadcast to one shape.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the constants are those of Random123.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = _product(0xD251_1F53, c0)
        high1, low1 = _product(0xCD9E_8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E37_79B9) & _MASK, (k1 + 0xBB67_AE85) & _MASK
    words = torch.broadcast_tensors(*(torch.as_tensor(word) for word in (c0, c1, c2, c3)))
    return words[0], words[1], words[2], words[3]


def _product(factor: int, word: Any) -> tuple[Any, Any]:
    """High and low 32 bits of a product of 32-bit numbers.

    By halves of the word: no product exceeds 2**48, because overflow of signed numbers is undefined in compiled code.
    """
    upper, lower = factor * (word >> 16), factor * (word & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


_LIBRARY = torch.library.Library("scrimp", "FRAGMENT")


def register(name: str, arguments: str, implementation: Any, fake: Any, *, flops: Callable[..., int]) -> Any:
    """Define an operator for every device."""
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scrimp::{name}", fake, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.scrimp, name))(flops)
    return getattr(torch.ops.scrimp, name).default


def _no_flops(*_: Any, **__: Any) -> int:
    return 0  # integers only


_ARGUMENTS = "int seed_low, int seed_high, int index, int stream, SymInt rows, SymInt count"
_TYPED = f"{_ARGUMENTS}, ScalarType dtype, Device device"
signs_op = register("philox_signs", f"{_ARGUMENTS}, Device device", _signs, _signs_fake, flops=_no_flops)
uniform_op = register("philox_uniform", _TYPED, _uniform, _uniform_fake, flops=_no_flops)
