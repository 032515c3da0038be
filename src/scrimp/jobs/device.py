"""Where to compute, for jobs without an accelerator of their own."""

from __future__ import annotations

import torch

from scrimp.primitives.errors import InputError


def pick_device(asked: str) -> str:
    """The device to compute on; ``auto`` takes an accelerator where there is one.

    Raises:
        InputError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [name for name, present in there.items() if present]
    if asked != "auto" and asked not in found:
        raise InputError(f"one of the devices here: {', '.join(found)}", asked, "pass --device cpu")
    return found[0] if asked == "auto" else asked
