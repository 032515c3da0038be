"""Agreement of two embeddings: the loss of BYOL, which mean shift and regression onto a teacher generalise.

Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020 (arXiv 2006.07733), eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError
from scrimp.represent.checks import check_pair, compute_type


def byol_loss(online: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared distance of the two unit vectors, ``2 - 2 cos(online, target)``.

    Args:
        online: predictions of the network that learns, [batch, dim].
        target: embeddings of the target network, [batch, dim]; no gradient goes to them.
        reduction: ``"mean"``, or ``"none"`` for one value an image.

    Returns:
        A scalar, or [batch]; float32 or wider, in [0, 4].

    Raises:
        InputError: shapes that do not fit, or another reduction.
    """
    check_pair(online, target)
    return reduced(2 - 2 * (unit(online) * unit(target.detach())).sum(1), reduction)


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their lengths, computed and given in float32 or wider.

    A row of zeros stays zero and gets no gradient; so does one below the least normal number of its type, whose
    gradient would overflow there.
    """
    wide = vectors.to(compute_type(vectors))
    # First by the largest number: the square of a huge one overflows, that of a tiny one vanishes.
    largest = wide.detach().abs().amax(1, keepdim=True)
    scaled = wide / largest.masked_fill(largest < torch.finfo(vectors.dtype).tiny, torch.inf)
    return functional.normalize(scaled, dim=1)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """[batch] as it is, or its mean.

    Raises:
        InputError: another reduction.
    """
    if reduction not in ("mean", "none"):
        raise InputError('reduction "mean" or "none"', f'"{reduction}"', "correct it")
    return losses.mean() if reduction == "mean" else losses
