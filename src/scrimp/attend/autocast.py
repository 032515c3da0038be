"""Autocast around operators that choose their own precision inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in autocast's type where it is on, as torch's own attention takes them; float64 stays."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products of float32 stay in float32 within."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
