"""Constrained mean shift against a loop: through earlier views, through labels, and where they find none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from represent_reference import (
    TOLERANCE,
    agree,
    constrained,
    draws,
    filled,
    mean_shift,
    of_label,
    ranked,
    through_earlier,
)

from scrimp.primitives.errors import InputError
from scrimp.represent import (
    NO_LABEL,
    Memory,
    byol_loss,
    confident_labels,
    constrained_mean_shift_loss,
    earlier_views,
    mean_shift_loss,
    same_label,
)
from scrimp.represent.constrained import _nearest_among

mixes = st.sampled_from([0.0, 0.3, 0.5, 1.0])


def nothing(target: torch.Tensor, memory: Memory, k: int):
    rows = torch.zeros(len(target), k, dtype=torch.int64)
    return rows, rows.bool()


@given(
    rows=st.integers(1, 6),
    dim=st.integers(2, 8),  # all numbers of one dimension are as near: which are the candidates is then open
    size=st.integers(1, 25),
    views=st.integers(1, 3),
    mix=mixes,
    missing=st.integers(0, 6),
    data=st.data(),
)
def test_through_earlier_views_against_a_loop(rows, dim, size, views, mix, missing, data) -> None:
    """With k' = k and with more candidates, memories that are partly filled, and images without an earlier view."""
    pushed = data.draw(st.integers(1, 2 * size))
    memory, before = filled(size, dim, pushed=pushed), filled(size, dim, pushed=pushed, seed=2)
    online = [draws(rows, dim, seed=10 + view).requires_grad_() for view in range(views)]
    target, earlier = draws(rows, dim, seed=20), draws(rows, dim, seed=21)
    earlier[:missing] = 0
    memory.push_(target)
    before.push_(earlier)
    k = data.draw(st.integers(1, memory.known))
    candidates = data.draw(st.sampled_from([None, k, k + 1, size, size + 3]).filter(lambda n: n is None or n >= k))
    constraint = earlier_views(earlier, before, k=candidates)
    ours = constrained_mean_shift_loss(
        online if views > 1 else online[0], target, memory, constraint=constraint, k=k, mix=mix, reduction="none"
    )
    allowed = through_earlier(earlier, before, k=k if candidates is None else candidates)
    agree(ours, constrained(online, target, memory, allowed, k=k, mix=mix), online, kind=torch.float64)


@given(
    rows=st.integers(1, 8),
    dim=st.integers(1, 8),
    size=st.integers(1, 25),
    mix=mixes,
    classes=st.integers(1, 5),
    push=st.booleans(),
    data=st.data(),
)
def test_same_label_against_a_loop(rows, dim, size, mix, classes, push, data) -> None:
    """Classes with many rows in the memory, with fewer than k, with none; and doubtful labels on either side."""
    label = st.integers(NO_LABEL, classes - 1)
    memory = Memory(size, dim, dtype=torch.float64)
    known = torch.tensor(data.draw(st.lists(label, min_size=size, max_size=size)))
    memory.push_(draws(size, dim, seed=1), labels=known)
    online, target = draws(rows, dim).requires_grad_(), draws(rows, dim, seed=20)
    labels = torch.tensor(data.draw(st.lists(label, min_size=rows, max_size=rows)))
    if push:
        memory.push_(target, labels=labels)
    k = data.draw(st.integers(1, size))
    ours = constrained_mean_shift_loss(
        online, target, memory, constraint=same_label(labels), k=k, mix=mix, reduction="none"
    )
    allowed = of_label(labels.tolist(), memory)
    agree(ours, constrained([online], target, memory, allowed, k=k, mix=mix), [online], kind=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["earlier", "labels"])
def test_half_precision(dtype: torch.dtype, form: str) -> None:
    exact, memory = filled(300, 32), filled(300, 32, dtype=dtype)
    online = draws(12, 32, dtype=dtype).requires_grad_()
    target = draws(12, 32, seed=3, dtype=dtype)
    labels = torch.arange(12) % 4
    if form == "labels":
        for each in (exact, memory):
            each.labels.copy_(torch.arange(300) % 5)
            each.push_(target, labels=labels)
        constraint, allowed = same_label(labels), of_label(labels.tolist(), exact)
    else:
        earlier = target + draws(12, 32, seed=4, dtype=dtype) / 8
        kept, before = filled(300, 32, seed=2), filled(300, 32, seed=2, dtype=dtype)
        for each, into in ((exact, kept), (memory, before)):
            each.push_(target)
            into.push_(earlier)
        # Rounding could take another candidate for the last one: only whole memories are candidates for certain.
        constraint = earlier_views(earlier, before, k=300)
        allowed = through_earlier(earlier.double(), kept, k=300)
    ours = constrained_mean_shift_loss(online, target, memory, constraint=constraint, reduction="none")
    agree(ours, constrained([online], target, exact, allowed, k=5, mix=0.5), [online], kind=dtype)


def first_epoch(missing: int):
    memory, before = filled(50, 6), filled(50, 6, pushed=0)
    target, earlier = draws(8, 6, seed=3), draws(8, 6, seed=4)
    earlier[:missing] = 0
    memory.push_(target)
    before.push_(torch.cat([earlier.new_zeros(50, 6), earlier]))
    memory.place = before.place = 8
    return target, memory, earlier_views(earlier, before)


def test_the_first_epoch_is_mean_shift() -> None:
    target, memory, constraint = first_epoch(8)
    online = draws(8, 6).requires_grad_()
    for mix in (0.0, 0.5, 1.0):
        ours = constrained_mean_shift_loss(online, target, memory, constraint=constraint, mix=mix)
        theirs = mean_shift_loss(online, target, memory)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(loss, online)[0] for loss in (ours, theirs)))


def test_an_epoch_begun_in_part_is_mixed_row_by_row() -> None:
    target, memory, constraint = first_epoch(3)
    online = draws(8, 6).requires_grad_()
    ours = constrained_mean_shift_loss(online, target, memory, constraint=constraint, mix=0, reduction="none")
    free = mean_shift_loss(online, target, memory, reduction="none")
    assert torch.equal(ours[:3], free[:3])
    assert bool((ours[3:] != free[3:]).all())
    rows, found = constraint(target, memory, 5)
    assert found.any(1).tolist() == [False] * 3 + [True] * 5
    assert rows.shape == found.shape == (8, 5)
    assert found.sum(1).tolist() == [0] * 3 + [5] * 5
    assert set(rows[found].tolist()) == set(range(3, 8))  # the only rows whose earlier view is known


def test_without_any_label_it_is_mean_shift() -> None:
    memory, online, target = filled(20, 4), draws(6, 4), draws(6, 4, seed=2)
    labels = torch.full((6,), NO_LABEL)
    memory.push_(target, labels=labels)
    ours = constrained_mean_shift_loss(online, target, memory, constraint=same_label(labels), mix=0)
    assert torch.equal(ours, mean_shift_loss(online, target, memory))


def test_an_unknown_label_does_not_find_its_like() -> None:
    memory, target = filled(20, 4), draws(2, 4, seed=2)
    _, found = same_label(torch.tensor([NO_LABEL, 0]))(target, memory, 3)
    assert not bool(found.any())


def test_fewer_of_a_class_than_neighbours_are_all_counted() -> None:
    memory, target = Memory(6, 3, dtype=torch.float64), draws(1, 3, seed=2)
    memory.push_(draws(6, 3), labels=torch.tensor([0, 1, 0, 1, 1, 1]))
    rows, found = same_label(torch.tensor([0]))(target, memory, 5)
    assert sorted(rows[found].tolist()) == [0, 2]
    ours = constrained_mean_shift_loss(target, target, memory, constraint=same_label(torch.tensor([0])), mix=0)
    near = memory.vectors[[0, 2]] @ (target[0] / target[0].norm())
    torch.testing.assert_close(ours, 2 - 2 * near.mean())


def test_one_neighbour_of_the_same_label_is_byol() -> None:
    memory, labels = filled(40, 16, dtype=torch.float32), torch.arange(9) % 3
    online, target = draws(9, 16, dtype=torch.float32), draws(9, 16, seed=3, dtype=torch.float32)
    memory.labels.copy_(torch.arange(40) % 3)
    memory.push_(target, labels=labels)
    ours = constrained_mean_shift_loss(online, target, memory, constraint=same_label(labels), k=1, mix=0)
    torch.testing.assert_close(ours, byol_loss(online, target), atol=1e-6, rtol=0)


def test_all_of_the_memory_as_candidates_is_mean_shift() -> None:
    memory, before = filled(30, 5), filled(30, 5, seed=2)
    online, target, earlier = draws(6, 5), draws(6, 5, seed=3), draws(6, 5, seed=4)
    ours = constrained_mean_shift_loss(
        online, target, memory, constraint=earlier_views(earlier, before, k=30), mix=0, reduction="none"
    )
    torch.testing.assert_close(ours, mean_shift_loss(online, target, memory, reduction="none"))


def test_the_order_of_both_memories_does_not_matter() -> None:
    memory, before = filled(40, 5), filled(40, 5, seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    memory.labels.copy_(torch.arange(40) % 3)
    shuffled, shuffled_before = filled(40, 5), filled(40, 5)
    shuffled.push_(memory.vectors[order], labels=memory.labels[order])
    shuffled_before.push_(before.vectors[order])
    online, target, earlier = draws(6, 5), draws(6, 5, seed=3), draws(6, 5, seed=4)
    labels = torch.tensor([0, 1, 2, 0, NO_LABEL, 7])
    for constraint, other in (
        (earlier_views(earlier, before), earlier_views(earlier, shuffled_before)),
        (earlier_views(earlier, before, k=12), earlier_views(earlier, shuffled_before, k=12)),
        (same_label(labels), same_label(labels)),
    ):
        ours, theirs = (
            constrained_mean_shift_loss(online, target, held, constraint=vouched, reduction="none")
            for held, vouched in ((memory, constraint), (shuffled, other))
        )
        torch.testing.assert_close(ours, theirs)


def test_a_constraint_of_ones_own() -> None:
    memory, online, target = filled(10, 4), draws(3, 4), draws(3, 4, seed=1)

    def the_first_row(target, memory, k):
        rows, found = nothing(target, memory, k)
        found[:, 0] = True
        return rows, found

    ours = constrained_mean_shift_loss(online, target, memory, constraint=the_first_row, k=4, mix=0, reduction="none")
    torch.testing.assert_close(ours, byol_loss(online, memory.vectors[:1].expand(3, -1), reduction="none"))


def test_autocast_changes_nothing() -> None:
    memory, before = filled(2000, 16, dtype=torch.float32), filled(2000, 16, seed=2, dtype=torch.float32)
    online, target, earlier = (draws(32, 16, seed=seed, dtype=torch.float32) for seed in (3, 4, 5))
    for constraint in (earlier_views(earlier, before, k=20), earlier_views(earlier, before)):
        plain = constrained_mean_shift_loss(online, target, memory, constraint=constraint, reduction="none")
        with torch.autocast("cpu", torch.bfloat16):
            found = constrained_mean_shift_loss(online, target, memory, constraint=constraint, reduction="none")
        torch.testing.assert_close(found, plain)


def test_autocast_does_not_reorder_the_candidates() -> None:
    memory, target = filled(2000, 16, dtype=torch.float32), draws(4, 16, seed=3, dtype=torch.float32)
    rows = torch.arange(2000).expand(4, -1)
    plain, _ = _nearest_among(target, memory, rows, torch.ones_like(rows, dtype=torch.bool), 50)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = _nearest_among(target, memory, rows, torch.ones_like(rows, dtype=torch.bool), 50)
    assert torch.equal(found, plain)


def test_confident_labels() -> None:
    probabilities = torch.tensor([[0.9, 0.06, 0.04], [0.05, 0.8, 0.15], [0.1, 0.04, 0.86], [0.85, 0.1, 0.05]])
    logits = probabilities.log().double().requires_grad_()
    assert confident_labels(logits).tolist() == [0, NO_LABEL, 2, NO_LABEL]
    assert confident_labels(logits, threshold=0.5).tolist() == [0, 1, 2, 0]
    assert confident_labels(logits, threshold=0.95).tolist() == [NO_LABEL] * 4
    assert confident_labels(torch.tensor([[0.0, 40.0]], dtype=torch.bfloat16)).tolist() == [1]
    assert confident_labels(torch.ones(0, 3)).shape == (0,)
    for logits, threshold in ((torch.ones(3), 0.5), (torch.ones(2, 3), 1.0), (torch.ones(2, 3), -0.1)):
        with pytest.raises(InputError, match=r"threshold in \[0, 1\); got shape .*, threshold"):
            confident_labels(logits, threshold=threshold)


def test_clear_errors() -> None:
    memory, online = filled(4, 3), draws(2, 3)
    with pytest.raises(InputError, match="k from 1 to the 4 embeddings in the memory; got 5"):
        constrained_mean_shift_loss(online, online, memory, constraint=nothing)
    for mix in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"mix in \[0, 1\]; got"):
            constrained_mean_shift_loss(online, online, memory, constraint=nothing, k=1, mix=mix)
    with pytest.raises(InputError, match=r"got \[2, 3\] and \[2, 4\]"):
        constrained_mean_shift_loss(online, draws(2, 4), memory, constraint=nothing, k=1)
    with pytest.raises(InputError, match=r"labels as int64 \[2\]; got int64 \[3\]"):
        constrained_mean_shift_loss(online, online, memory, constraint=same_label(torch.arange(3)), k=1)
    for earlier, before, k, said in (
        (draws(3, 3), filled(4, 3), None, r"earlier and target .*; got \[3, 3\] and \[2, 3\]"),
        (draws(2, 3), filled(5, 3), None, "a memory of earlier views of 4 rows; got 5"),
        (draws(2, 3), filled(4, 3), 1, "at least k = 2 candidates; got 1"),
    ):
        with pytest.raises(InputError, match=said):
            constrained_mean_shift_loss(
                online, online, memory, constraint=earlier_views(earlier, before, k=k), k=2, mix=0.5
            )


def test_no_constraint_at_all_is_mean_shift() -> None:
    memory, online, target = filled(12, 4), draws(5, 4), draws(5, 4, seed=1)
    ours = constrained_mean_shift_loss(online, target, memory, constraint=nothing, k=3, reduction="none")
    torch.testing.assert_close(ours, mean_shift([online], target, memory, k=3), atol=1e-12, rtol=0)


def test_a_candidate_whose_target_was_never_there_does_not_count() -> None:
    memory, before = filled(6, 4), filled(6, 4, seed=2)
    online, target, earlier = draws(2, 4), draws(2, 4, seed=3), draws(2, 4, seed=4)
    missing = [ranked(vector, before, range(6))[0] for vector in earlier]
    memory.vectors[missing], memory.present[missing] = 0, False
    constraint = earlier_views(earlier, before)
    ours = constrained_mean_shift_loss(online, target, memory, constraint=constraint, k=3, mix=0, reduction="none")
    allowed = [[row for row in ranked(vector, before, range(6))[:3] if row not in missing] for vector in earlier]
    torch.testing.assert_close(ours, constrained([online], target, memory, allowed, k=3, mix=0))
