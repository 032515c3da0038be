"""What the members of this family ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


def check_pair(online: Tensor, target: Tensor, *, names: str = "online and target") -> None:
    """Refuse embeddings that are not two floating [batch, dim] of one shape with one row or more."""
    if online.ndim != 2 or online.shape != target.shape or 0 in online.shape:
        got = f"{list(online.shape)} and {list(target.shape)}"
        raise InputError(f"{names} of one shape [batch, dim]", got, "flatten them, or add a head that maps to one size")
    for tensor in (online, target):
        if not tensor.is_floating_point():
            raise InputError(f"{names} as floating numbers", str(tensor.dtype), "convert them first")


def check_neighbours(k: int, known: int, *, remedy: str = "lower k, or fill the memory first") -> None:
    """Refuse more neighbours than there are embeddings."""
    if not 1 <= k <= known:
        raise InputError(f"k from 1 to the {known} embeddings in the memory", f"{k}", remedy)


def check_rows(name: str, values: Tensor, rows: int) -> None:
    """Refuse anything but one whole number a row."""
    if values.shape != (rows,) or values.is_floating_point() or values.dtype == torch.bool:
        got = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise InputError(f"{name} as int64 [{rows}]", got, "pass one whole number an embedding")


def compute_type(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where it comes in: sums of products of half-precision numbers lose too much."""
    return torch.promote_types(tensor.dtype, torch.float32)
