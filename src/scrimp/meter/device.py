"""Whether a GPU takes part, asked without loading torch."""

import sys
from typing import Any


def cuda_in_use() -> Any | None:
    """``torch.cuda`` if this process has begun to use it, else ``None``: CUDA that nobody began is not to be waked."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda


def synchronise() -> None:
    """Wait for the GPU, where one is in use: its work goes on after the call that asked for it."""
    cuda = cuda_in_use()
    if cuda is not None:
        cuda.synchronize()
