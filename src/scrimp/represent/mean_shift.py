"""Mean shift: an image's view is drawn to the nearest neighbours of its other view, not to that view alone.

Source: Koohpayegani, Tejankar and Pirsiavash, "Mean Shift for Self-Supervised Learning", ICCV 2021 (arXiv 2105.07269).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.represent.byol import reduced, unit
from scrimp.represent.checks import check_pair
from scrimp.represent.memory import Memory

Online = Tensor | Sequence[Tensor]
"""One online view of every image, [batch, dim], or several of the same images (multi-crop), each of that shape."""


def mean_shift_loss(online: Online, target: Tensor, memory: Memory, *, k: int = 5, reduction: str = "mean") -> Tensor:
    """Mean squared distance of each online vector to the ``k`` nearest neighbours of its target in the memory.

    ``(1/k) sum_{z in S} (2 - 2 v.z)``, S the k nearest neighbours of u among the memory (eq. 1 of the paper). Push the
    batch's targets first (`Memory.push_`): u then is its own nearest neighbour, and k = 1 is `byol_loss`.

    Args:
        online: v, predictions of the network that learns, [batch, dim]; several such for multi-crop: their mean counts.
        target: u, embeddings of the target network, [batch, dim]; no gradient goes to them.
        memory: past targets.
        k: neighbours.
        reduction: ``"mean"``, or ``"none"`` for one value an image.

    Returns:
        A scalar, or [batch]; float32 or wider, in [0, 4].

    Raises:
        InputError: shapes that do not fit, or fewer than k embeddings in the memory.
    """
    views = checked_views(online, target)
    return reduced(mean_distance(views, memory, memory.search(target, k)), reduction)


def checked_views(online: Online, target: Tensor) -> list[Tensor]:
    """The online views as a list, each of the target's shape.

    Raises:
        InputError: none, or one of another shape.
    """
    views = [online] if isinstance(online, Tensor) else list(online)
    if not views:
        raise InputError("one online view or more", "none", "pass the predictions")
    for view in views:
        check_pair(view, target)
    return views


def mean_distance(views: Sequence[Tensor], memory: Memory, rows: Tensor, found: Tensor | None = None) -> Tensor:
    """``2 - 2 v.z``, the mean over all views v and over z in ``rows`` [batch, k], those ``found`` (bool); [batch]."""
    vectors = torch.stack([unit(view) for view in views]).mean(0)
    near = memory.vectors[rows].to(vectors.dtype)
    if found is None:
        mean = near.mean(1)
    else:
        mean = (near * found[:, :, None]).sum(1) / found.sum(1, keepdim=True).clamp_min(1)
    return 2 - 2 * (vectors * mean).sum(1)
