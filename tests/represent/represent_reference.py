"""The losses of this family as the papers write them, image by image and neighbour by neighbour; and inputs to try."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.represent import Memory

# Largest error of a loss (all lie between 0 and 4), or of a gradient times its vector's length where that is below 1
# (a gradient goes as one over the length, and what is left of it may have cancelled to nothing).
# What comes in, or is kept, in half precision is rounded once; a search among rounded vectors may also take the second
# of two neighbours that are as near as rounding can tell.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Candidates = Sequence[Sequence[int] | None]
"""Rows of the memory in which each image's neighbours are sought; ``None`` where there is no constraint."""


def draws(rows: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that float32 and wider types hold alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator).to(dtype)


def filled(size: int, dim: int, *, pushed: int | None = None, seed: int = 1, dtype: torch.dtype = torch.float64):
    """A memory into which ``pushed`` rows went (as many as it holds where omitted)."""
    memory = Memory(size, dim, dtype=dtype)
    memory.push_(draws(size if pushed is None else pushed, dim, seed=seed))
    return memory


def of_unit_length(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


def ranked(vector: Tensor, memory: Memory, rows: Sequence[int]) -> list[int]:
    """These rows, the one nearest to the vector first."""
    known = memory.vectors.double()
    near = {row: float((known[row] * of_unit_length(vector)).sum()) for row in rows}
    return sorted(near, key=lambda row: -near[row])


def present(memory: Memory) -> list[int]:
    return [row for row in range(len(memory)) if bool((memory.vectors[row] != 0).any())]


def mean_shift(views: Sequence[Tensor], target: Tensor, memory: Memory, *, k: int) -> Tensor:
    """Eq. 1 of mean shift, [batch]; several views share one target."""
    rows = [ranked(vector, memory, present(memory))[:k] for vector in target.detach()]
    return _distances(views, memory, rows)


def constrained(
    views: Sequence[Tensor], target: Tensor, memory: Memory, candidates: Candidates, *, k: int, mix: float
) -> Tensor:
    """Constrained mean shift with given candidates, [batch]."""
    free = mean_shift(views, target, memory, k=k)
    rows = [ranked(u, memory, allowed or present(memory))[:k] for u, allowed in zip(target, candidates, strict=True)]
    bound = _distances(views, memory, rows)
    share = torch.tensor([1.0 if allowed is None else mix for allowed in candidates], dtype=torch.float64)
    return (1 - share) * bound + share * free


def through_earlier(earlier: Tensor, before: Memory, *, k: int) -> list[list[int] | None]:
    """The k' rows of M' nearest to each image's earlier view."""
    known = present(before)
    return [ranked(vector, before, known)[:k] if known and bool((vector != 0).any()) else None for vector in earlier]


def of_label(labels: Sequence[int], memory: Memory) -> list[list[int] | None]:
    """Rows of each image's own class."""
    found = []
    for label in labels:
        same = [row for row in present(memory) if int(memory.labels[row]) == label != -1]
        found.append(same or None)
    return found


def _distances(views: Sequence[Tensor], memory: Memory, rows: Sequence[Sequence[int]]) -> Tensor:
    known = memory.vectors.double()
    losses = []
    for image, near in enumerate(rows):
        terms = [2 - 2 * (of_unit_length(view[image].double()) * known[row]).sum() for view in views for row in near]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def agree(ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor], *, kind: torch.dtype) -> None:
    """Losses [batch], and the gradients of an uneven sum of them, within the table's tolerance."""
    limit = TOLERANCE[kind]
    assert ours.dtype == torch.promote_types(leaves[0].dtype, torch.float32)
    torch.testing.assert_close(ours.double(), theirs, atol=limit, rtol=0)
    weights = torch.linspace(0.5, 2, len(theirs), dtype=torch.float64)
    found = torch.autograd.grad((ours * weights.to(ours.dtype)).sum(), leaves)
    right = torch.autograd.grad((theirs * weights).sum(), leaves)
    for mine, other, leaf in zip(found, right, leaves, strict=True):
        assert mine.dtype == other.dtype
        worst = (mine.double() - other.double()).abs() * leaf.detach().double().norm(dim=1, keepdim=True).clamp_max(1)
        assert float(worst.max()) <= limit
