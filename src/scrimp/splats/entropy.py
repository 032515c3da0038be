"""Whole numbers in few bytes: an adaptive range coder for rows of fields and for points on a grid.

Probabilities are learned while coding, those of fields as the mean of three running distributions, those of points
mixed from three contexts in the logistic domain (Mattern 2012). Integers alone: the same bytes on every machine, as
docs/splat-container.md specifies. Without the native library the twin of `scrimp.splats.entropy_twin` does the same,
slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats import entropy_twin as twin

LARGEST = 1 << 22
"""Magnitude below which every field must lie."""
MOST_SHIFT = 15
LEVELS = 31
"""Digits of a coordinate, at most."""


def encode_fields(values: Tensor, *, shifts: Tensor, predicted: Sequence[bool], counts: Tensor | None = None) -> bytes:
    """Rows of whole numbers.

    Args:
        values: [n, c] int32 in units of ``2 ** shift``, of magnitude below `LARGEST`.
        shifts: [n, c], or [n, 1] for all columns, uint8 up to `MOST_SHIFT`; known to the decoder.
        predicted: [c], whether a column is coded as the difference from a running mean of itself.
        counts: [n] uint8, how many of its columns a row has, known to the decoder; all where omitted.

    Returns:
        The bytes; they hold neither n nor c.

    Raises:
        InputError: numbers out of range.
    """
    most = max(abs(int(end)) for end in torch.aminmax(values)) if values.numel() else 0
    if most >= LARGEST:
        raise InputError(f"numbers below {LARGEST}", f"{most}", "take larger steps")
    values = values.to(torch.int32).contiguous()
    shifts, kinds, counts = _sides(shifts, predicted, counts)
    module = native.load()
    if module is None:
        return twin.encode_fields(values, shifts.expand(values.shape), kinds, counts)
    return bytes(module.range_encode_fields(values.data_ptr(), *values.shape, *_places(shifts, kinds, counts)))


def decode_fields(data: bytes, *, shifts: Tensor, predicted: Sequence[bool], counts: Tensor | None = None) -> Tensor:
    """What `encode_fields` was given, int32 [n, c]; 0 where a row has no column.

    Raises:
        InputError: bytes that are no stream of this shape.
    """
    shifts, kinds, counts = _sides(shifts, predicted, counts)
    blank = torch.empty if counts is None else torch.zeros
    values = blank(len(shifts), len(kinds), dtype=torch.int32)
    module = native.load()
    if module is None:
        whole = twin.decode_fields(data, values, shifts.expand(values.shape), kinds, counts)
    else:
        whole = module.range_decode_fields(data, values.data_ptr(), *values.shape, *_places(shifts, kinds, counts))
    return _spent(values, whole)


def decode_rotated(data: bytes, *, shifts: Tensor, counts: Tensor, axes: Tensor, step: float) -> Tensor:
    """What `decode_fields` and then `scrimp.splats.codec_harmonics.rotated_from` return, the numbers never kept.

    Args:
        shifts: [n] uint8, of all columns; none is predicted.
        counts: [n] uint8 up to m.
        axes: [d, m] float32, d up to 128.
        step: of shift 0.

    Returns:
        [n, d] float32.

    Raises:
        InputError: bytes that are no stream of this shape.
    """
    from scrimp.splats.codec_harmonics import rotated_from_torch

    steps, (width, used) = step * torch.exp2(shifts.float()), axes.shape
    module = native.load()
    if module is None:
        numbers = decode_fields(data, shifts=shifts[:, None], predicted=[False] * used, counts=counts)
        return rotated_from_torch(numbers, axes, steps)
    found, directions = torch.empty(len(shifts), width), axes.T.contiguous()
    shifts, counts = shifts.contiguous(), counts.contiguous()
    sides = shifts.data_ptr(), counts.data_ptr(), steps.data_ptr(), directions.data_ptr()
    whole = module.range_decode_rotated(data, found.data_ptr(), len(found), used, width, *sides)
    return _spent(found, whole)


def encode_points(points: Tensor, *, drops: Tensor, levels: int) -> bytes:
    """Points on a grid in Morton order, each to its own precision.

    Args:
        points: [n, 3] int32 from 0 below ``2 ** levels``, in the order of their `point_codes`; the lowest ``drop``
            digits of each coordinate a 1 followed by zeros, the middle of what they leave open.
        drops: [n] uint8 up to ``levels``; known to the decoder.
        levels: digits a coordinate, 0 to `LEVELS`.
    """
    points, drops = points.to(torch.int32).contiguous(), drops.contiguous()
    module = native.load()
    if module is None:
        return twin.encode_points(points, drops, levels)
    return bytes(module.range_encode_points(points.data_ptr(), len(points), levels, drops.data_ptr()))


def decode_points(data: bytes, *, drops: Tensor, levels: int) -> Tensor:
    """What `encode_points` was given, int32 [n, 3].

    Raises:
        InputError: bytes that are no stream of so many points.
    """
    drops = drops.contiguous()
    points = torch.empty(len(drops), 3, dtype=torch.int32)
    module = native.load()
    if module is None:
        whole = twin.decode_points(data, points, drops, levels)
    else:
        whole = module.range_decode_points(data, points.data_ptr(), len(drops), levels, drops.data_ptr())
    return _spent(points, whole)


def point_order(points: Tensor) -> Tensor:
    """The permutation into Morton order, x before y before z, of points [n, 3] from 0 below ``2 ** LEVELS``: int64 [n].

    Equal points keep their order.
    """
    order = point_codes(points & (1 << _WORD) - 1).argsort(stable=True)
    if not len(points) or int(points.max()) < 1 << _WORD:
        return order
    return order[point_codes(points[order] >> _WORD).argsort(stable=True)]


def point_codes(points: Tensor) -> Tensor:
    """[n] int64: Morton codes of 21 digits an axis, x before y before z."""
    found = torch.zeros(len(points), dtype=torch.int64)
    for axis in range(3):
        codes = points[:, axis].to(torch.int64)
        for shift, mask in _SPREAD:
            codes = codes.bitwise_or_(codes << shift).bitwise_and_(mask)
        found |= codes << 2 - axis
    return found


_WORD = 21  # digits of three coordinates that one int64 holds
_SPREAD = (
    (32, 0x1F00000000FFFF),
    (16, 0x1F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


def _sides(shifts: Tensor, predicted: Sequence[bool], counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kinds = torch.tensor(list(predicted), dtype=torch.uint8)
    return shifts.contiguous(), kinds, None if counts is None else counts.contiguous()


def _places(shifts: Tensor, kinds: Tensor, counts: Tensor | None) -> tuple[int, int, int, int]:
    return shifts.shape[1], shifts.data_ptr(), kinds.data_ptr(), 0 if counts is None else counts.data_ptr()


def _spent(values: Tensor, whole: bool) -> Tensor:
    if not whole:
        raise InputError("a whole stream of numbers", "one that ends too soon or too late", "copy the file again")
    return values
