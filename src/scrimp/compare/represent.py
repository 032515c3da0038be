"""Learning without labels: loops over memory and neighbours as references; BYOL and distilled logits as baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.represent_step import Distillation, Pretraining
from scrimp.primitives.draw import generator_for
from scrimp.represent import (
    NO_LABEL,
    Constraint,
    Memory,
    byol_loss,
    constrained_mean_shift_loss,
    earlier_views,
    mean_shift_loss,
    regression_loss,
    same_label,
)

Loss = Callable[..., Tensor]
Allowed = Sequence[Sequence[int]]
_IMAGES, _DIM, _SIZE, _K, _CANDIDATES = 24, 16, 150, 5, 12


def check_mean_shift(*, seed: int = 0, loss: Loss = mean_shift_loss) -> list[Finding]:
    """Hold losses and gradients against a loop in float64, and one neighbour against BYOL."""
    online, target = _views(seed, 3), _draws(seed, 10)
    found = []
    for what, views, memory in (
        ("memory full", online[:1], _memory(seed, 11, target)),
        ("memory filled in part", online[:1], _memory(seed, 11, target, before=40)),
        ("three views", online, _memory(seed, 11, target)),
    ):
        given = views[0] if len(views) == 1 else views
        ours = loss(given, target, memory, k=_K, reduction="none")
        found += _agree(what, ours, _loop(views, target, memory, [_present(memory)] * _IMAGES), views)
    ours = loss(online[0], target, _memory(seed, 11, target), k=1, reduction="none")
    theirs = byol_loss(online[0].double(), target.double(), reduction="none")
    return [*found, *_agree("one neighbour against BYOL", ours, theirs, online[:1], bound=1e-6)]


def check_constrained(
    *, seed: int = 0, loss: Loss = constrained_mean_shift_loss, through: Callable[..., Constraint] = earlier_views
) -> list[Finding]:
    """Hold all three forms against a loop, and the first epoch, which has no earlier views, against mean shift."""
    online, target, earlier = _views(seed, 1), _draws(seed, 10), _draws(seed, 12)
    some = earlier.clone()
    some[::3] = 0  # images that are new to the cache
    found = []
    for what, seen, k in (
        ("earlier views, k' = k", earlier, _K),
        ("earlier views, k' > k", earlier, _CANDIDATES),
        ("earlier views of some images", some, _K),
    ):
        memory, before = _memory(seed, 11, target), _memory(seed, 13, seen)
        allowed = [_ranked(each, before, _present(before))[:k] if bool(each.any()) else [] for each in seen]
        found += _constrained(what, loss, online, target, memory, through(seen, before, k=k), allowed)
    labels = torch.arange(_IMAGES) % 6
    doubtful = labels.where(torch.arange(_IMAGES) % 4 > 0, NO_LABEL)
    for what, known in (("labels", labels), ("pseudo-labels, some doubtful", doubtful)):
        memory = _memory(seed, 11, target, labels=known)
        allowed = [_same(label, memory) for label in known.tolist()]
        found += _constrained(what, loss, online, target, memory, same_label(known), allowed, mix=0.0)
    return [*found, *_first_epoch(loss, online, target, seed)]


def check_regression(*, seed: int = 0, loss: Loss = regression_loss) -> list[Finding]:
    """Hold losses and gradients onto one and two teachers against the formula; nothing may reach a teacher."""
    generator, found = generator_for(seed), []
    for what, widths in (("one teacher", [_DIM]), ("two teachers", [_DIM, 2 * _DIM + 1])):
        students = [torch.randn(_IMAGES, width, generator=generator).requires_grad_() for width in widths]
        teachers = [torch.randn(_IMAGES, width, generator=generator).mul_(3).requires_grad_() for width in widths]
        ours = loss(students, teachers, reduction="none")
        reached = torch.autograd.grad(ours.sum(), teachers, retain_graph=True, allow_unused=True)
        found += _agree(what, ours, _formula(students, [each.detach() for each in teachers]), students)
        size = sum(float(grad.abs().sum()) for grad in reached if grad is not None)
        found.append(at_most(f"{what}: gradient that reaches a teacher", size, 0))
    return found


def sides_mean_shift(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """One training step: the target sees one view and the online network the other; or each sees both (BYOL)."""
    step = Pretraining(seed=seed, device=device)
    return Sides(step.mean_shift, step.byol, repeats=repeats)


def sides_constrained(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """As for mean shift, with a second memory, filled from a cache of the epoch before."""
    step = Pretraining(seed=seed, device=device)
    return Sides(step.constrained, step.byol, repeats=repeats)


def sides_regression(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """One training step of the same student under the same teacher: by its features, or by its logits."""
    step = Distillation(seed=seed, device=device)
    return Sides(step.regression, step.logits, repeats=repeats)


def _draws(seed: int, stream: int, rows: int = _IMAGES) -> Tensor:
    return torch.randn(rows, _DIM, generator=generator_for(seed, stream))


def _views(seed: int, count: int) -> list[Tensor]:
    return [_draws(seed, stream).requires_grad_() for stream in range(count)]


def _memory(seed: int, stream: int, latest: Tensor, *, before: int = 2 * _SIZE, labels: Tensor | None = None) -> Memory:
    """A memory into which ``before`` embeddings went, those of 7 classes where labels are given, and then a batch."""
    memory = Memory(_SIZE, _DIM)
    memory.push_(_draws(seed, stream, before), labels=None if labels is None else torch.arange(before) % 7)
    memory.push_(latest, labels=labels)
    return memory


def _constrained(
    what: str,
    loss: Loss,
    online: list[Tensor],
    target: Tensor,
    memory: Memory,
    constraint: Constraint,
    allowed: Allowed,
    **options: Any,
) -> list[Finding]:
    ours = loss(online[0], target, memory, constraint=constraint, k=_K, reduction="none", **options)
    free = _loop(online, target, memory, [_present(memory)] * _IMAGES)
    mix = torch.tensor([options.get("mix", 0.5) if rows else 1.0 for rows in allowed])
    bound = _loop(online, target, memory, [rows or _present(memory) for rows in allowed])
    return _agree(what, ours, (1 - mix) * bound + mix * free, online)


def _first_epoch(loss: Loss, online: list[Tensor], target: Tensor, seed: int) -> list[Finding]:
    memory, nothing = _memory(seed, 11, target), torch.zeros_like(target)
    constraint = earlier_views(nothing, _memory(seed, 13, nothing, before=0))
    ours = loss(online[0], target, memory, constraint=constraint, k=_K, reduction="none")
    theirs = mean_shift_loss(online[0], target, memory, k=_K, reduction="none")
    return _agree("first epoch against mean shift", ours, theirs, online, bound=0.0)


def _loop(views: Sequence[Tensor], target: Tensor, memory: Memory, allowed: Allowed) -> Tensor:
    """Image by image: the k rows allowed that are nearest to the target, each view's distance to each of them."""
    losses = []
    for image, rows in enumerate(allowed):
        near = _ranked(target[image], memory, rows)[:_K]
        terms = [(_unit(view[image]) - memory.vectors[row].double()).square().sum() for view in views for row in near]
        losses.append(sum(terms, torch.zeros((), dtype=torch.float64)) / len(terms))
    return torch.stack(losses)


def _formula(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    losses = []
    for image in range(_IMAGES):
        pairs = zip(students, teachers, strict=True)
        terms = [(_unit(ours[image]) - _unit(theirs[image])).square().sum() for ours, theirs in pairs]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def _ranked(vector: Tensor, memory: Memory, rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: -float(memory.vectors[row].double() @ _unit(vector.detach())))


def _present(memory: Memory) -> list[int]:
    return [row for row in range(_SIZE) if bool(memory.vectors[row].any())]


def _same(label: int, memory: Memory) -> list[int]:
    return [row for row in _present(memory) if int(memory.labels[row]) == label != NO_LABEL]


def _unit(vector: Tensor) -> Tensor:
    return vector.double() / vector.double().norm()


def _agree(what: str, ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor], *, bound: float = 2e-6) -> list[Finding]:
    """Largest errors of the losses (0 to 4), and of the gradients of an uneven sum of them."""
    weights = torch.linspace(0.5, 2, _IMAGES, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((losses * weights).sum(), leaves, materialize_grads=True) for losses in (ours, theirs)
    ]
    worst = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    loss = float((ours.detach().double() - theirs.detach().double()).abs().max())
    return [at_most(f"{what}: loss", loss, bound), at_most(f"{what}: gradients", worst, bound)]
