"""Labels for what would move the model most, and in different directions: choices by gradients.

The gradient of one image's loss with respect to a linear head's weight is the outer product of its residual
``r = dloss / dlogits`` [classes] and its features [d], so that inner products of gradients are products of two small
ones. An adapter of few coefficients goes further: its whole gradient is a few numbers an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import CHUNK, Gaps, Points, plus_plus
from scrimp.select.active_pool import Pool, chosen, pool, predictions
from scrimp.select.attention_maps import entropy
from scrimp.select.selection import Selection

_ROWS = 2048  # images whose products with every basis are held at a time


def badge(
    features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
) -> Selection:
    """BADGE: k-means++ among the head's gradients, were each image's predicted class its label.

    Ash et al., "Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds", ICLR 2020, algorithm 1; as in
    their repository the first image is the one of largest gradient. The n x classes x d gradients are never formed:
    ``|g_i - g_j|^2 = |r_i|^2 |h_i|^2 + |r_j|^2 |h_j|^2 - 2 <r_i, r_j> <h_i, h_j>``.

    Args:
        features: [n, d], what the head multiplies; append a column of 1 for its bias.
        probabilities: [n, classes].
        labelled: indices of the images that have a label.
        budget: how many more to label.
        generator: CPU generator.

    Returns:
        Selection of ``min(budget, unlabelled)`` distinct indices, in order of choice.

    Raises:
        InputError: no probabilities, features not finite, indices out of range, or a budget below 0.
    """
    known = pool(features, labelled, budget)
    residuals = predicted_residuals(predictions(probabilities, len(features)))
    return _spread(known, Points(residuals, known.features), generator)


def coefficient_gradients(
    embeddings: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
) -> Selection:
    """k-means++ among the gradients of an adapter's few coefficients, the largest gradient first.

    What `badge` is for a head: with NOLA's random bases the gradients are a random projection of the weight's.

    Args:
        embeddings: [n, k], one gradient an image, such as `head_gradients`.
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        generator: CPU generator.

    Returns, raises: as `badge`.
    """
    known = pool(embeddings, labelled, budget)
    return _spread(known, Points(known.features, known.features.new_ones(len(embeddings), 1)), generator)


def _spread(known: Pool, points: Points, generator: torch.Generator) -> Selection:
    """k-means++ from the longest point; two factors, so that lengths are from the origin."""
    if known.budget == 0:
        return chosen(known, [], generator=generator)
    gaps = Gaps(points)
    longest = gaps.squares[known.left].max()
    first = known.left[(gaps.squares[known.left] == longest).nonzero()[0]]
    gaps.add(int(first))
    mass = known.unlabelled().to(torch.float64)
    mass[first] = 0
    rest = plus_plus(gaps, known.budget - 1, mass=mass, generator=generator)
    return chosen(known, [int(first), *rest], generator=generator)


def coefficient_determinants(
    embeddings: Tensor,
    probabilities: Tensor | None,
    labelled: Tensor,
    budget: int,
    /,
    *,
    ridge: float = 1.0,
    generator: torch.Generator,
) -> Selection:
    """Each next image the one whose gradient adds most to ``log det(A)``, ``A = lambda I + sum_chosen g g^T``.

    The greedy choice of a determinantal point process and of D-optimal design: the gain is ``log(1 + g^T A^-1 g)``,
    kept up by rank-one changes in O(n k) a choice. Labelled images are in A from the start, so that directions already
    known are passed over. Suits few coefficients; needs no model of what the labels will be.

    Args:
        embeddings: [n, k], one gradient an image, such as `head_gradients`.
        probabilities: not looked at.
        labelled: indices of the images that have a label.
        budget: how many more to label.
        ridge: lambda, in units of the mean squared entry of ``embeddings``; > 0.
        generator: CPU generator; used where no image has a gradient.

    Returns, raises: as `badge`; also InputError for a ridge that is not above 0. Of equals the first is taken.
    """
    if not ridge > 0:
        raise InputError("a ridge above 0", f"{ridge}", "use 1 for one average image's worth")
    known = pool(embeddings, labelled, budget)
    values = known.features.to(torch.promote_types(embeddings.dtype, torch.float32))
    scale = float(values.square().mean()) if values.numel() else 0.0
    if known.budget == 0 or scale == 0:
        return chosen(known, [], generator=generator)
    rows = values[known.labelled].to("cpu", torch.float64)
    precision = ridge * scale * torch.eye(values.shape[1], dtype=torch.float64) + rows.T @ rows
    inverse = torch.linalg.inv(precision)
    gains = torch.cat([(part @ inverse.to(part) * part).sum(1) for part in values.split(CHUNK)])
    allowed = known.unlabelled()
    picks: list[int] = []
    for _ in range(known.budget):
        open_gains = torch.where(allowed, gains, -torch.inf)
        index = int((open_gains == open_gains.max()).nonzero()[0])
        picks.append(index)
        allowed[index] = False
        row = values[index].to("cpu", torch.float64)
        direction = inverse @ row
        room = 1 + float(row @ direction)
        gains = (gains - (values @ direction.to(values)).square() / room).clamp_min_(0)
        inverse = inverse - torch.outer(direction, direction) / room
    return chosen(known, picks, generator=generator)


def predicted_residuals(probabilities: Tensor) -> Tensor:
    """``p - e_y`` with y the most probable class (of equals the first): dloss / dlogits were the prediction right.

    Args:
        probabilities: [n, classes].
    """
    best = probabilities.argmax(1, keepdim=True)
    return probabilities.scatter_add(1, best, torch.full_like(probabilities[:, :1], -1.0))


def expected_residuals(probabilities: Tensor) -> Tensor:
    """``-p (log p + H)``: the gradient of the loss expected under the model's own p, which is its entropy H.

    With p held fixed the expected gradient ``sum_y p_y (p - e_y)`` is 0 for every image; here p moves with the logits.

    Args:
        probabilities: [n, classes].
    """
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return -probabilities * (logs + entropy(probabilities)[:, None])


def head_gradients(
    features: Tensor,
    residuals: Tensor,
    *,
    outer: Tensor,
    inner: Tensor,
    outer_bases: Tensor,
    inner_bases: Tensor,
) -> Tensor:
    """The gradient of each image's loss with respect to the coefficients of a NOLA head on frozen features.

    The head's weight is ``W_0 + B A``, ``A = A_0 + sum_i alpha_i A_i`` and ``B = sum_j beta_j B_j``, so that
    ``dloss / dalpha_i = r^T B A_i h`` and ``dloss / dbeta_j = r^T B_j A h``. While the betas are 0, so are the first.

    Args:
        features: h, [n, d].
        residuals: r, [n, classes], such as `predicted_residuals` or `expected_residuals`, times the adapter's scale.
        outer: B, [classes, rank].
        inner: A, [rank, d].
        outer_bases: B_j, [betas, classes, rank].
        inner_bases: A_i, [alphas, rank, d].

    Returns:
        [n, alphas + betas], float32 or wider.

    Raises:
        InputError: shapes that do not belong together.
    """
    shapes = [list(item.shape) for item in (features, residuals, outer, inner, outer_bases, inner_bases)]
    width, rank = features.shape[-1], outer.shape[-1]
    wanted = [
        [len(features), width],
        [len(features), residuals.shape[-1]],
        [residuals.shape[-1], rank],
        [rank, width],
        [len(outer_bases), residuals.shape[-1], rank],
        [len(inner_bases), rank, width],
    ]
    if shapes != wanted:
        raise InputError(f"shapes {wanted}", f"{shapes}", "pass the factors of one head")
    wide = torch.promote_types(torch.promote_types(features.dtype, residuals.dtype), torch.float32)
    flat_inner, flat_outer = inner_bases.to(wide).flatten(0, 1), outer_bases.to(wide).transpose(1, 2).flatten(0, 1)
    found = torch.empty(len(features), len(inner_bases) + len(outer_bases), dtype=wide, device=features.device)
    for start in range(0, len(features), _ROWS):
        here = slice(start, start + _ROWS)
        h, r = features[here].to(wide), residuals[here].to(wide)
        alphas = (h @ flat_inner.T).view(len(h), len(inner_bases), rank) @ (r @ outer.to(wide))[:, :, None]
        betas = (r @ flat_outer.T).view(len(h), len(outer_bases), rank) @ (h @ inner.to(wide).T)[:, :, None]
        found[here] = torch.cat([alphas, betas], 1)[:, :, 0]
    return found
