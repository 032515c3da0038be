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


def encode_fields(values: Tensor, *, shifts: Tensor, predicted: Sequence[bool], counts: Tensor | None = None) -> bytes:
    """Rows of whole numbers.

    Args:
        values: [n, c] int32 in units of ``2 ** shift``, of magnitude below `LARGEST`.
        shifts: [n, c] uint8 up to `MOST_SHIFT`; known to the decoder.
        predicted: [c], whether a column is coded as the difference from a running mean of itself.
        counts: [n] uint8, how many of its columns a row has, known to the decoder; all where omitted.

    Returns:
        The bytes; they hold neither n nor c.

    Raises:
        InputError: numbers out of range.
    """
    if values.numel() and int(values.abs().max()) >= LARGEST:
        raise InputError(f"numbers below {LARGEST}", f"{int(values.abs().max())}", "take larger steps")
    values = values.to(torch.int32).contiguous()
    shifts, kinds, counts = _sides(shifts, predicted, counts)
    module = native.load()
    if module is None:
        return twin.encode_fields(values, shifts, kinds, counts)
    return bytes(module.range_encode_fields(values.data_ptr(), *values.shape, *_places(shifts, kinds, counts)))


def decode_fields(data: bytes, *, shifts: Tensor, predicted: Sequence[bool], counts: Tensor | None = None) -> Tensor:
    """What `encode_fields` was given, int32 [n, c]; 0 where a row has no column.

    Raises:
        InputError: bytes that are no stream of this shape.
    """
    shifts, kinds, counts = _sides(shifts, predicted, counts)
    values = torch.zeros(shifts.shape, dtype=torch.int32)
    module = native.load()
    if module is None:
        whole = twin.decode_fields(data, values, shifts, kinds, counts)
    else:
        whole = module.range_decode_fields(data, values.data_ptr(), *values.shape, *_places(shifts, kinds, counts))
    return _spent(values, whole)


def encode_points(points: Tensor, *, drops: Tensor, levels: int) -> bytes:
    """Points on a grid in Morton order, each to its own precision.

    Args:
        points: [n, 3] int32 from 0 below ``2 ** levels``, in the order of their `point_codes`; the lowest ``drop``
            digits of each coordinate a 1 followed by zeros, the middle of what they leave open.
        drops: [n] uint8 up to ``levels``; known to the decoder.
        levels: digits a coordinate, 0 to 21.
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
    points = torch.zeros(len(drops), 3, dtype=torch.int32)
    module = native.load()
    if module is None:
        whole = twin.decode_points(data, points, drops, levels)
    else:
        whole = module.range_decode_points(data, points.data_ptr(), len(drops), levels, drops.data_ptr())
    return _spent(points, whole)


def point_codes(points: Tensor) -> Tensor:
    """[n] int64: Morton codes of 21 digits an axis, x before y before z."""
    codes = points.to(torch.int64)
    for shift, mask in _SPREAD:
        codes = (codes | (codes << shift)) & mask
    return (codes << torch.tensor([2, 1, 0])).sum(1)


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


def _places(shifts: Tensor, kinds: Tensor, counts: Tensor | None) -> tuple[int, int, int]:
    return shifts.data_ptr(), kinds.data_ptr(), 0 if counts is None else counts.data_ptr()


def _spent(values: Tensor, whole: bool) -> Tensor:
    if not whole:
        raise InputError("a whole stream of numbers", "one that ends too soon or too late", "copy the file again")
    return values
