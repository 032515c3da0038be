"""What every member of the family keeps, each checked to fail on a member that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from represent_reference import draws
from torch import Tensor

from scrimp.represent import (
    NO_LABEL,
    Memory,
    byol_loss,
    constrained_mean_shift_loss,
    earlier_views,
    logit_distillation_loss,
    mean_shift_loss,
    regression_loss,
    same_label,
)

IMAGES, DIM, SIZE = 9, 6, 40


@dataclass
class Case:
    """A batch, and a memory of targets with labels beside one of earlier views, row for row."""

    online: Tensor
    target: Tensor
    earlier: Tensor
    labels: Tensor
    memory: Memory
    before: Memory

    def tensors(self) -> list[Tensor]:
        memories = (self.memory, self.before)
        held = [tensor for memory in memories for tensor in (memory.vectors, memory.labels, memory.present)]
        return [self.online, self.target, self.earlier, self.labels, *held]


def case(dtype: torch.dtype = torch.float64) -> Case:
    online, target, earlier = (draws(IMAGES, DIM, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    earlier[4] = 0
    labels = torch.tensor([0, 1, 2, NO_LABEL, 0, 1, 2, 0, 7])
    memory, before = (Memory(SIZE, DIM, dtype=dtype) for _ in range(2))
    memory.push_(draws(SIZE - 3, DIM, seed=4, dtype=dtype), labels=torch.arange(SIZE - 3) % 3)
    before.push_(draws(SIZE - 3, DIM, seed=5, dtype=dtype))
    memory.push_(target, labels=labels)
    before.push_(earlier)
    return Case(online, target, earlier, labels, memory, before)


Member = Callable[[Case, str], Tensor]
Promise = Callable[[Member], None]


def through_earlier(given: Case, reduction: str) -> Tensor:
    return constrained_mean_shift_loss(
        given.online,
        given.target,
        given.memory,
        constraint=earlier_views(given.earlier, given.before, k=8),
        reduction=reduction,
    )


def through_labels(given: Case, reduction: str) -> Tensor:
    constraint = same_label(given.labels)
    return constrained_mean_shift_loss(
        given.online, given.target, given.memory, constraint=constraint, mix=0, reduction=reduction
    )


def two_views(given: Case, reduction: str) -> Tensor:
    views = [given.online, given.online.flip(1)]
    return mean_shift_loss(views, given.target, given.memory, k=3, reduction=reduction)


def two_teachers(given: Case, reduction: str) -> Tensor:
    students = [given.online, given.online.flip(1)]
    return regression_loss(students, [given.target, given.earlier], reduction=reduction)


MEMBERS: dict[str, Member] = {
    "byol": lambda given, reduction: byol_loss(given.online, given.target, reduction=reduction),
    "mean_shift": lambda given, reduction: mean_shift_loss(
        given.online, given.target, given.memory, reduction=reduction
    ),
    "mean_shift, two views": two_views,
    "constrained, earlier views": through_earlier,
    "constrained, labels": through_labels,
    "regression": lambda given, reduction: regression_loss(given.online, given.target, reduction=reduction),
    "regression, two teachers": two_teachers,
    "logit_distillation": lambda given, reduction: logit_distillation_loss(
        given.online, given.target, reduction=reduction
    ),
}


def one_value_an_image_or_their_mean(member: Member) -> None:
    given = case()
    each = member(given, "none")
    assert each.shape == (IMAGES,)
    assert len(set(each.tolist())) == IMAGES
    assert float(each.min()) >= 0
    mean = member(given, "mean")
    assert mean.shape == ()
    torch.testing.assert_close(mean, sum(each) / IMAGES)


def same_arguments_same_result(member: Member) -> None:
    first, second = (member(case(), "none") for _ in range(2))
    assert torch.equal(first, second)


def arguments_untouched(member: Member) -> None:
    given, place = case(), case().memory.place
    given.online.requires_grad_()
    member(given, "mean").backward()
    assert all(torch.equal(*pair) for pair in zip(given.tensors(), case().tensors(), strict=True))
    assert given.memory.place == given.before.place == place


def global_generator_untouched(member: Member) -> None:
    before = torch.get_rng_state()
    member(case(), "mean")
    assert torch.equal(before, torch.get_rng_state())


def only_the_online_network_learns(member: Member) -> None:
    given = case()
    for tensor in (given.online, given.target, given.earlier):
        tensor.requires_grad_()
    member(given, "mean").backward()
    assert float(given.online.grad.abs().sum()) > 0
    assert given.target.grad is None
    assert given.earlier.grad is None


def each_image_for_itself(member: Member) -> None:
    """Neither its place in the batch nor its company matters."""
    given, order = case(), torch.tensor([3, 8, 0, 5, 1, 4, 7, 2, 6])
    whole = member(given, "none")
    torch.testing.assert_close(member(_chosen(given, order), "none"), whole[order])
    torch.testing.assert_close(member(_chosen(given, order[:1]), "none"), whole[order[:1]])


def the_order_of_the_memory_does_not_matter(member: Member) -> None:
    given, other = case(), case()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    for memory in (other.memory, other.before):
        for tensor in (memory.vectors, memory.labels, memory.present):
            tensor.copy_(tensor[order])
    torch.testing.assert_close(member(other, "none"), member(given, "none"))


def half_precision_is_computed_in_float32(member: Member) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        given = case(dtype)
        given.online.requires_grad_()
        loss = member(given, "mean")
        assert loss.dtype == torch.float32
        loss.backward()
        assert given.online.grad.dtype == dtype
        assert bool(given.online.grad.isfinite().all())


PROMISES: list[Promise] = [
    one_value_an_image_or_their_mean,
    same_arguments_same_result,
    arguments_untouched,
    global_generator_untouched,
    only_the_online_network_learns,
    each_image_for_itself,
    the_order_of_the_memory_does_not_matter,
    half_precision_is_computed_in_float32,
]


def _chosen(given: Case, rows: Tensor) -> Case:
    parts = (tensor[rows] for tensor in (given.online, given.target, given.earlier, given.labels))
    return Case(*parts, given.memory, given.before)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda item: item.__name__)
@pytest.mark.parametrize("name", MEMBERS)
def test_promise(name: str, promise: Promise) -> None:
    promise(MEMBERS[name])


def summing(given: Case, reduction: str) -> Tensor:
    each = MEMBERS["mean_shift"](given, "none")
    return each if reduction == "none" else each.sum()


calls = iter(range(10**6))


def drifting(given: Case, reduction: str) -> Tensor:
    return MEMBERS["mean_shift"](given, reduction) + 1e-9 * next(calls)


def pushing(given: Case, reduction: str) -> Tensor:
    given.memory.push_(given.target)
    return MEMBERS["mean_shift"](given, reduction)


def noisy(given: Case, reduction: str) -> Tensor:
    return MEMBERS["mean_shift"](given, reduction) + torch.rand(()) * 1e-9


def teaching_the_target(given: Case, reduction: str) -> Tensor:
    losses = 2 - 2 * torch.cosine_similarity(given.online, given.target)
    return losses.mean() if reduction == "mean" else losses


def centred(given: Case, reduction: str) -> Tensor:
    return byol_loss(given.online - given.online.mean(0), given.target, reduction=reduction)


def newest(given: Case, reduction: str) -> Tensor:
    """Takes the first rows of the memory for the neighbours."""
    return byol_loss(given.online, given.memory.vectors[:IMAGES].mean(0).expand_as(given.online), reduction=reduction)


def in_half(given: Case, reduction: str) -> Tensor:
    losses = 2 - 2 * torch.cosine_similarity(given.online, given.target.detach())
    return losses.mean() if reduction == "mean" else losses


@pytest.mark.touches_global_rng
@pytest.mark.parametrize(
    ("promise", "broken"),
    list(
        zip(
            PROMISES,
            [summing, drifting, pushing, noisy, teaching_the_target, centred, newest, in_half],
            strict=True,
        )
    ),
    ids=lambda item: item.__name__,
)
def test_promise_fails_on_a_broken_member(promise: Promise, broken: Member) -> None:
    with pytest.raises(AssertionError):
        promise(broken)
