"""How large an adapter is to be, by the count of its numbers or by the bytes of its file."""

from __future__ import annotations

from torch import nn

from scrimp.adapt.file import file_bytes
from scrimp.adapt.lora import Lora, lora
from scrimp.adapt.nola import Nola, nola
from scrimp.adapt.targets import Where, find_targets
from scrimp.primitives.errors import InputError

_FEWEST = 8  # bases a factor below which all weights share one larger set of numbers
_LOWEST_BITS = 8  # and below: bits that are trained at


def nola_of(
    model: nn.Module,
    numbers: int,
    *,
    where: Where = None,
    rank: int = 4,
    seed: int = 0,
    bits: int | None = None,
) -> Nola:
    """The `nola` whose trained numbers come closest to ``numbers`` without being more.

    With too few for 8 bases a factor, all weights share one set of numbers.

    Args:
        model: without adapters.
        numbers: the most that are trained, beside parameters in full.
        where: weights to adapt, as in `attach_`.
        rank: as in `nola`, like seed and bits.

    Raises:
        InputError: fewer than 2 numbers, or as many as the factors have entries: LoRA is no larger then.
    """
    return _method([target.shape for target in find_targets(model, where)], numbers, rank, seed, bits)


def nola_of_bytes(
    model: nn.Module, size: int, *, bits: int = 32, where: Where = None, rank: int = 4, seed: int = 0
) -> Nola:
    """The largest `nola` of `nola_of` whose file, saved at ``bits`` a number, has at most ``size`` bytes.

    Names, shapes and scales are counted as they are written; parameters trained in full beside it are not. At 8 bits
    and below the numbers are trained at so many.

    Args:
        model: without adapters.
        size: bytes of the file.
        bits: 32, 16, 8, 4, 3 or 2.
        where: weights to adapt, as in `attach_`.
        rank: as in `nola`, like seed.

    Raises:
        InputError: too few bytes for 2 numbers, or enough for all entries of LoRA's factors.
    """
    named = [(target.name, target.shape) for target in find_targets(model, where)]
    shapes = [shape for _, shape in named]
    trained = bits if bits <= _LOWEST_BITS else None

    def needs(numbers: int) -> int:
        return file_bytes(_method(shapes, numbers, rank, seed, trained), named, bits)

    low, high = 2, rank * sum(side for shape in shapes for side in shape)
    if needs(low) > size:
        raise InputError(f"at least {needs(low)} bytes for this model's names and 2 numbers", f"{size}", "ask for more")
    if needs(high - 1) < size:
        raise InputError(
            f"at most {needs(high - 1)} bytes: LoRA at rank {rank} is no larger",
            f"{size}",
            "take lora, or a higher rank",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= size else (low, middle)
    return _method(shapes, low, rank, seed, trained)


def lora_of(model: nn.Module, numbers: int, *, where: Where = None, seed: int = 0) -> Lora:
    """The `lora` of the largest rank whose entries are at most ``numbers``.

    Raises:
        InputError: rank 1 has more, or the rank would exceed the largest side of the weights.
    """
    shapes = [target.shape for target in find_targets(model, where)]
    each, most = sum(map(sum, shapes)), max(map(max, shapes))
    if numbers < each:
        raise InputError(f"at least {each} numbers for LoRA at rank 1", f"{numbers}", "ask for more, or take nola")
    if numbers // each > most:
        raise InputError(f"at most {each * most} numbers, rank {most}", f"{numbers}", "ask for fewer, or take full")
    return lora(numbers // each, seed=seed)


def lora_of_bytes(model: nn.Module, size: int, *, bits: int = 32, where: Where = None, seed: int = 0) -> Lora:
    """The `lora` of the largest rank whose file, saved at ``bits`` a number, has at most ``size`` bytes.

    Arguments are those of `nola_of_bytes`.

    Raises:
        InputError: too few bytes for rank 1, or more than the largest rank takes.
    """
    named = [(target.name, target.shape) for target in find_targets(model, where)]
    each, most = sum(sum(shape) for _, shape in named), max(max(shape) for _, shape in named)
    rank = size * 8 // (bits * each)
    if rank > most:
        raise InputError(f"at most the {most * each * bits // 8} bytes of rank {most}", f"{size}", "take full")
    while rank and file_bytes(lora(rank, seed=seed), named, bits) > size:
        rank -= 1
    if rank == 0:
        least = file_bytes(lora(1, seed=seed), named, bits)
        raise InputError(f"at least {least} bytes for LoRA at rank 1", f"{size}", "ask for more, or take nola")
    return lora(rank, seed=seed)


def _method(shapes: list[tuple[int, int]], numbers: int, rank: int, seed: int, bits: int | None) -> Nola:
    sides = sorted(rank * side for shape in shapes for side in shape)
    if numbers < 2:
        raise InputError("at least 2 numbers", f"{numbers}", "ask for more")
    if numbers >= sum(sides):
        raise InputError(
            f"fewer than the {sum(sides)} numbers of LoRA at rank {rank}", f"{numbers}", "take lora, or a higher rank"
        )
    shared = numbers < _FEWEST * len(sides)
    return nola(rank, numbers // 2 if shared else _bases(numbers, sides), seed, shared=shared, bits=bits)


def _bases(numbers: int, sides: list[int]) -> int:
    """The most bases a factor so that all together are at most ``numbers``; small factors take what they hold."""
    left = numbers
    for place, side in enumerate(sides):
        share = left // (len(sides) - place)
        if share < side:
            return share
        left -= side
    return sides[-1]
