"""Native kernels as torch operators, so that compilation, fake tensors and FLOP counting see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Not torch.library.custom_op, whose operators import torch's compiler, seconds of work, when they are first called.
_LIBRARY = torch.library.Library("scrimp", "FRAGMENT")


def operator(
    name: str,
    schema: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Any:
    """Define ``scrimp::name`` for the CPU and return it.

    Args:
        run: the kernel, on tensors whose gradients are not recorded.
        fake: what has the shapes, dtypes and strides of its results and no numbers.
        keep: as `torch.library.register_autograd` takes ``setup_context``.
        gradient: of the operator; without one a gradient that would flow through it is refused.
    """
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"scrimp::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"scrimp::{name}", gradient or _refuse, setup_context=keep, lib=_LIBRARY)
    return getattr(torch.ops.scrimp, name).default


def _refuse(*_: Any) -> Any:
    raise RuntimeError(
        "the gradient of this kernel is derived by hand and has no gradient of its own; use float64, which runs torch"
    )
