"""Attention maps over locations: what they must be, their entropy, their mixture with the uniform map, expectations."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


def entropy(attention: Tensor) -> Tensor:
    """Entropy of each map, ``-sum_i a_i log a_i`` in nats, with 0 log 0 = 0.

    Its gradient is finite where an attention has underflowed to 0, which ``log`` alone would turn into NaN. Training
    subtracts a share of its mean from the loss, so that attention does not settle before the features mean anything.

    Args:
        attention: [..., locations], rows that sum to 1.

    Returns:
        [...], float32 or wider.
    """
    values = attention.to(torch.promote_types(attention.dtype, torch.float32))
    return -(values * values.clamp_min(torch.finfo(values.dtype).tiny).log()).sum(-1)


def smoothed(attention: Tensor, share: float) -> Tensor:
    """``(1 - share) a + share / locations``: no location is ever out of reach.

    Args:
        attention: [..., locations], rows that sum to 1.
        share: of the uniform map, in [0, 1]; 1e-5 to 1e-4 is usual.

    Raises:
        InputError: ``share`` out of its range.
    """
    if not 0 <= share <= 1:
        raise InputError("a share in [0, 1]", f"{share}", "pass the uniform map's part of the mixture, such as 1e-4")
    return (1 - share) * attention + share / attention.shape[-1]


def expectation(attention: Tensor, all_features: Tensor) -> Tensor:
    """``Phi = sum_i a_i f_i`` over all locations: what sampling estimates, and its reference.

    Args:
        attention: [batch, locations].
        all_features: [batch, locations, dim].

    Returns:
        [batch, dim], in the wider dtype of the two.

    Raises:
        InputError: the shapes do not belong together.
    """
    if attention.ndim != 2 or all_features.ndim != 3 or all_features.shape[:2] != attention.shape:
        raise InputError(
            "attention [batch, locations] and features [batch, locations, dim]",
            f"{list(attention.shape)} and {list(all_features.shape)}",
            "flatten the grid of locations of both",
        )
    wide = torch.promote_types(attention.dtype, all_features.dtype)
    return torch.einsum("bk,bkd->bd", attention.to(wide), all_features.to(wide))


def check_attention(attention: Tensor) -> None:
    """Refuse what is no batch of distributions.

    How far a sum may be from 1 allows for a softmax that was rounded to the dtype, not for a map left as it came.

    Raises:
        InputError: another shape or a dtype that is not floating; a value negative, infinite or NaN; a sum beside 1.
    """
    if attention.ndim != 2 or attention.shape[1] == 0 or not attention.is_floating_point():
        raise InputError(
            "floating attention [batch, locations], locations >= 1",
            f"{attention.dtype} {list(attention.shape)}",
            "flatten the grid of locations",
        )
    values = attention.detach().to(torch.promote_types(attention.dtype, torch.float32))
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise InputError(
            "finite attention >= 0", "a negative, infinite or NaN value", "check the attention network's loss"
        )
    off = (values.sum(1) - 1).abs()
    if bool((off > (1e-3 if torch.finfo(attention.dtype).eps < 1e-5 else 5e-2)).any()):
        raise InputError(
            "attention that sums to 1 over the locations",
            f"a sum that is {float(off.max()):.3g} off",
            "normalise it, by softmax over the flattened grid",
        )
