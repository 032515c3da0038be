"""The target network: a slowly moving average of the one that learns."""

from __future__ import annotations

import copy

import torch
from torch import nn

from scrimp.primitives.errors import InputError


def target_of(online: nn.Module) -> nn.Module:
    """A copy without gradients, to be moved by `follow_`; in training mode, its batch statistics are its own."""
    target = copy.deepcopy(online)
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    return target


@torch.no_grad()
def follow_(target: nn.Module, online: nn.Module, *, momentum: float = 0.99) -> None:
    """``target <- momentum * target + (1 - momentum) * online``, parameters only, in place.

    Buffers are left alone: the target normalises by its own batches (section 3 of the mean-shift paper's code). Call it
    before the target's forward pass.

    Raises:
        InputError: networks of different shape, or a momentum out of [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise InputError("a momentum in [0, 1]", f"{momentum}", "pass 0.99")
    ours: list[torch.Tensor] = list(target.parameters())
    theirs = [item.detach() for item in online.parameters()]
    if [item.shape for item in ours] != [item.shape for item in theirs]:
        raise InputError("a target of the online network's shape", "another", "make it with target_of(online)")
    if ours:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
