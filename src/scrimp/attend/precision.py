"""The types that attention computes in: wide sums inside, and what autocast makes of the inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or wider: half precision is worked on in float32."""
    return torch.promote_types(dtype, torch.float32)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in autocast's type where it is on, as torch's own attention takes them; float64 stays."""
    kind = tensors[0].device.type
    if not _autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products of float32 stay in float32 within."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
