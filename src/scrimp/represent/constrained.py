"""Constrained mean shift: the neighbours are sought only where something else vouches for them.

Source: Navaneet, Abbasi Koohpayegani, Tejankar, Pourahmadi, Subramanya and Pirsiavash, "Constrained Mean Shift Using
Distant Yet Related Neighbors for Representation Learning", ECCV 2022 (arXiv 2112.04607).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import nearest
from scrimp.represent.byol import reduced, unit
from scrimp.represent.checks import check_neighbours, check_pair, check_rows
from scrimp.represent.mean_shift import Online, checked_views, mean_distance
from scrimp.represent.memory import NO_LABEL, Memory

Found = tuple[Tensor, Tensor]
Constraint = Callable[[Tensor, Memory, int], Found]
"""``constraint(target [batch, dim], memory, k)`` -> rows of the memory, int64 [batch, k], the nearest first, and which
of them count, bool [batch, k]. An image with no row that counts is left to the unconstrained neighbours."""


def constrained_mean_shift_loss(
    online: Online,
    target: Tensor,
    memory: Memory,
    *,
    constraint: Constraint,
    k: int = 5,
    mix: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """`mean_shift_loss` with neighbours that a constraint vouches for, mixed with that of free ones.

    ``(1 - mix) * CMSF + mix * MSF``; the paper mixes evenly without labels, and not at all with them. An image for
    which the constraint finds nothing (the first epoch, a doubtful label) has the unconstrained loss.

    Args:
        online, target, memory, k, reduction: as for `mean_shift_loss`; push the targets first.
        constraint: `earlier_views`, `same_label`, or your own.
        mix: share of the unconstrained loss.

    Returns:
        A scalar, or [batch]; float32 or wider, in [0, 4].

    Raises:
        InputError: shapes that do not fit, fewer than k embeddings in the memory, or ``mix`` out of [0, 1].
    """
    views = checked_views(online, target)
    if not 0 <= mix <= 1:
        raise InputError("mix in [0, 1]", f"{mix}", "pass 0.5, or 0 for labels")
    check_neighbours(k, memory.known)
    rows, found = constraint(target, memory, k)
    bound = found.any(1)
    losses = mean_distance(views, memory, rows, found)
    if mix > 0 or not bool(bound.all()):
        free = mean_distance(views, memory, memory.search(target, k))
        losses = torch.where(bound, (1 - mix) * losses + mix * free, free)
    return reduced(losses, reduction)


def earlier_views(earlier: Tensor, memory: Memory, *, k: int | None = None) -> Constraint:
    """Neighbours found through an earlier view of the same images: the self-supervised constraint.

    ``memory`` (M') holds, row for row beside the memory of targets (M), what the target network made of another view of
    the same image; the k' rows nearest to ``earlier`` in M' are the candidates C in M, and the k of them nearest to
    the target are the neighbours. With k' = k, the paper's choice, all of C counts.

    Args:
        earlier: embedding of another view of each image in the batch, [batch, dim], such as that of the epoch before
            (`EmbeddingCache.read`); a row of zeros where there is none yet: that image is then unconstrained.
        memory: M', into which ``earlier`` was pushed when the targets were pushed into M.
        k: k', candidates; as many as neighbours where omitted.

    Raises (when called):
        InputError: ``earlier`` is not as long as the batch, or M' not as large as M.
    """

    def constraint(target: Tensor, targets: Memory, neighbours: int) -> Found:
        check_pair(earlier, target, names="earlier and target")
        if len(memory) != len(targets):
            raise InputError(f"a memory of earlier views of {len(targets)} rows", f"{len(memory)}", "make both alike")
        wanted = neighbours if k is None else k
        if wanted < neighbours:
            raise InputError(f"at least k = {neighbours} candidates", f"{wanted}", "raise the constraint's k")
        vectors = unit(earlier.detach())
        known = vectors.ne(0).any(1)
        if not bool(memory.present.any()):
            return _none_found(target, neighbours)
        similar, rows = nearest(
            vectors.to(memory.vectors.dtype), memory.vectors, min(wanted, len(memory)), allowed=memory.present
        )
        found = (similar > -torch.inf) & known[:, None] & targets.present[rows]
        return _nearest_among(target, targets, rows, found, neighbours)

    return constraint


def same_label(labels: Tensor) -> Constraint:
    """Neighbours of the same class: the supervised constraint, and the semi-supervised one with pseudo-labels.

    Args:
        labels: class of each image in the batch, int64 [batch]; `NO_LABEL` (-1) where it is unknown or doubtful: that
            image is then unconstrained. The memory's own labels are those given to `Memory.push_`.

    Raises (when called):
        InputError: labels of another shape.
    """

    def constraint(target: Tensor, memory: Memory, neighbours: int) -> Found:
        check_rows("labels", labels, len(target))
        rows = torch.zeros(len(target), neighbours, dtype=torch.int64, device=target.device)
        found = torch.zeros_like(rows, dtype=torch.bool)
        vectors = unit(target.detach()).to(memory.vectors.dtype)
        for label in labels.unique().tolist():
            members = (memory.labels == label).logical_and_(memory.present).nonzero().flatten()
            if label == NO_LABEL or not len(members):
                continue
            mine = (labels == label).nonzero().flatten()
            count = min(neighbours, len(members))
            _, places = nearest(vectors[mine], memory.vectors[members], count)
            rows[mine, :count] = members[places]
            found[mine, :count] = True
        return rows, found

    return constraint


def confident_labels(logits: Tensor, *, threshold: float = 0.85) -> Tensor:
    """The predicted class where its probability exceeds ``threshold``, else `NO_LABEL`.

    [batch, classes] -> int64 [batch]; the paper takes 0.85.

    Raises:
        InputError: logits of another shape, or a threshold out of [0, 1).
    """
    if logits.ndim != 2 or not 0 <= threshold < 1:
        got = f"shape {list(logits.shape)}, threshold {threshold}"
        raise InputError("logits [batch, classes] and a threshold in [0, 1)", got, "pass the classifier's outputs")
    confidence, label = logits.detach().float().softmax(1).max(1)
    return torch.where(confidence > threshold, label, NO_LABEL)


def _nearest_among(target: Tensor, memory: Memory, rows: Tensor, found: Tensor, k: int) -> Found:
    """Of the candidates [batch, c], the k nearest to each target; fewer count where fewer are found."""
    if rows.shape[1] <= k:
        return rows, found
    # No product of matrices: autocast would take one in half precision.
    similar = (memory.vectors[rows] * unit(target.detach())[:, None]).sum(2)
    _, kept = similar.masked_fill(~found, -torch.inf).topk(k, dim=1)
    return rows.gather(1, kept), found.gather(1, kept)


def _none_found(target: Tensor, k: int) -> Found:
    rows = torch.zeros(len(target), k, dtype=torch.int64, device=target.device)
    return rows, torch.zeros_like(rows, dtype=torch.bool)
