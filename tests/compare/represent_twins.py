"""Ways in which the losses of `scrimp.represent` might be wrong, and the finding that must say so."""

from __future__ import annotations

import torch

from scrimp.represent import (
    byol_loss,
    constrained_mean_shift_loss,
    earlier_views,
    mean_shift_loss,
    regression_loss,
)
from scrimp.represent.byol import unit


def without_itself(online, target, memory, *, k, **options):
    """The neighbours but the nearest, which is the target itself."""
    rows = memory.search(target, k + 1)[:, 1:]
    near = memory.vectors[rows].mean(1)
    return 2 - 2 * (unit(online[0] if isinstance(online, list) else online) * near).sum(1)


def first_view_only(online, *others, **options):
    return mean_shift_loss(online[0] if isinstance(online, list) else online, *others, **options)


def length_taken_for_constant(online, target, memory, **options):
    """Right values; the gradient points along the neighbour, not across the vector."""
    views = online if isinstance(online, list) else [online]
    exact = mean_shift_loss([view.detach() for view in views], target, memory, **options)
    pull = sum((view / view.detach().norm(dim=1, keepdim=True) * unit(target)).sum(1) for view in views)
    return exact - 2 * (pull - pull.detach()) / len(views)


def empty_rows_as_neighbours(online, target, memory, **options):
    """Rows that were never filled, at a distance of 2 from everything, are found like others."""
    near = torch.topk(unit(target) @ memory.vectors.T, options["k"]).indices
    near[~memory.present.all().expand(len(near)), -1] = len(memory) - 1
    views = online if isinstance(online, list) else [online]
    return 2 - 2 * (torch.stack([unit(view) for view in views]).mean(0) * memory.vectors[near].mean(1)).sum(1)


def neighbours_of_the_online_vector(online, target, memory, **options):
    views = online if isinstance(online, list) else [online]
    return mean_shift_loss(online, views[0].detach(), memory, **options)


def unconstrained(online, target, memory, *, constraint, k, mix=0.5, reduction):
    return mean_shift_loss(online, target, memory, k=k, reduction=reduction)


def nearest_candidates_only(earlier, memory, *, k):
    """k' = k whatever was asked for: the second search has nothing to choose from."""
    return earlier_views(earlier, memory)


def noise_in_the_first_epoch(online, target, memory, *, constraint, k, mix=0.5, reduction):
    """The old library's fault: what was never cached constrains like anything else."""

    def all_found(given, held, wanted):
        rows, found = constraint(given, held, wanted)
        return rows, torch.ones_like(found)

    return constrained_mean_shift_loss(online, target, memory, constraint=all_found, k=k, mix=mix, reduction=reduction)


def always_mixed_evenly(online, target, memory, *, mix=0.5, **options):
    return constrained_mean_shift_loss(online, target, memory, mix=0.5, **options)


def doubtful_images_dropped(online, target, memory, *, constraint, k, mix=0.5, reduction):
    losses = constrained_mean_shift_loss(
        online, target, memory, constraint=constraint, k=k, mix=mix, reduction=reduction
    )
    return losses * constraint(target, memory, k)[1].any(1)


def one_minus_cosine(students, teachers, **options):
    return regression_loss(students, teachers, **options) / 2


def summed_over_teachers(students, teachers, **options):
    return regression_loss(students, teachers, **options) * len(teachers)


def lengths_count(students, teachers, *, reduction):
    terms = [(a - b.detach()).square().sum(1) for a, b in zip(students, teachers, strict=True)]
    return torch.stack(terms).mean(0)


def teachers_learn(students, teachers, *, reduction):
    terms = [2 - 2 * (unit(a) * unit(b)).sum(1) for a, b in zip(students, teachers, strict=True)]
    return torch.stack(terms).mean(0)


def students_swapped(students, teachers, *, reduction):
    """Every prediction is held against the first teacher."""
    terms = [byol_loss(a[:, : teachers[0].shape[1]], teachers[0], reduction="none") for a in students]
    return torch.stack(terms).mean(0)


BROKEN_REPRESENT = [
    ("mean-shift", {"loss": without_itself}, "one neighbour against BYOL: loss"),
    ("mean-shift", {"loss": without_itself}, "memory full: loss"),
    ("mean-shift", {"loss": first_view_only}, "three views: loss"),
    ("mean-shift", {"loss": length_taken_for_constant}, "one neighbour against BYOL: gradients"),
    ("mean-shift", {"loss": length_taken_for_constant}, "memory full: gradients"),
    ("mean-shift", {"loss": empty_rows_as_neighbours}, "filled in part: loss"),
    ("mean-shift", {"loss": neighbours_of_the_online_vector}, "filled in part: gradients"),
    ("mean-shift", {"loss": neighbours_of_the_online_vector}, "three views: gradients"),
    ("constrained-mean-shift", {"loss": unconstrained}, "k' = k: loss"),
    ("constrained-mean-shift", {"loss": unconstrained}, "k' = k: gradients"),
    ("constrained-mean-shift", {"loss": unconstrained}, "of some images: gradients"),
    ("constrained-mean-shift", {"through": nearest_candidates_only}, "k' > k: loss"),
    ("constrained-mean-shift", {"through": nearest_candidates_only}, "k' > k: gradients"),
    ("constrained-mean-shift", {"loss": noise_in_the_first_epoch}, "first epoch against mean shift: loss"),
    ("constrained-mean-shift", {"loss": noise_in_the_first_epoch}, "first epoch against mean shift: gradients"),
    ("constrained-mean-shift", {"loss": noise_in_the_first_epoch}, "of some images: loss"),
    ("constrained-mean-shift", {"loss": always_mixed_evenly}, "labels: loss"),
    ("constrained-mean-shift", {"loss": doubtful_images_dropped}, "pseudo-labels, some doubtful: loss"),
    ("constrained-mean-shift", {"loss": doubtful_images_dropped}, "pseudo-labels, some doubtful: gradients"),
    ("regression", {"loss": one_minus_cosine}, "one teacher: loss"),
    ("regression", {"loss": lengths_count}, "one teacher: gradients"),
    ("regression", {"loss": teachers_learn}, "one teacher: gradient that reaches"),
    ("regression", {"loss": teachers_learn}, "two teachers: gradient that reaches"),
    ("regression", {"loss": summed_over_teachers}, "two teachers: loss"),
    ("regression", {"loss": students_swapped}, "two teachers: gradients"),
]
