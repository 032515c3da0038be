"""How a call must run so that torch's dispatcher shows all of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled functions as the eager code they were made from: compiled kernels do not pass the dispatcher.

    Under a dispatch mode torch does so by itself, but refuses functions compiled with ``fullgraph=True``.
    """
    if "torch._dynamo" not in sys.modules:  # without it nothing can have been compiled, and importing it is slow
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def take_apart(mode: TorchDispatchMode, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run a composite operator as its parts, each seen by ``mode``; ``NotImplemented`` if it is not composite.

    Autograd takes them apart by itself; under ``inference_mode`` they arrive whole.
    """
    if types or not isinstance(func, torch._ops.OpOverload):  # a tensor subclass may have its own way with the whole
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)
