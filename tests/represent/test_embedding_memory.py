"""The ring of past embeddings against a list whose oldest entries are dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from represent_reference import TOLERANCE, draws, filled, of_unit_length, present, ranked

from scrimp.primitives.errors import InputError
from scrimp.represent import NO_LABEL, Memory, mean_shift_loss


class Plain:
    """What a memory should hold, as a list, the oldest first."""

    def __init__(self, size: int) -> None:
        self.size, self.entries = size, []

    def push(self, vectors: torch.Tensor, labels: list[int]) -> None:
        for vector, label in zip(vectors, labels, strict=True):
            self.entries.append((of_unit_length(vector), label))
            if len(self.entries) > self.size:
                del self.entries[0]


def in_order(memory: Memory) -> tuple[torch.Tensor, list[int]]:
    """What it holds, the oldest first: from the next row to be overwritten on, around the ring."""
    rows = [(memory.place + step) % len(memory) for step in range(len(memory))]
    rows = [row for row in rows if bool(memory.present[row])]
    return memory.vectors[rows], memory.labels[rows].tolist()


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 21), max_size=8), seed=st.integers(0, 10**6))
def test_the_oldest_make_room(size: int, batches: list[int], seed: int) -> None:
    memory, plain = Memory(size, 3, dtype=torch.float64), Plain(size)
    for number, batch in enumerate(batches):
        vectors = draws(batch, 3, seed=seed + number)
        labels = torch.arange(batch) % 4 + number
        rows = memory.push_(vectors, labels=labels)
        plain.push(vectors, labels.tolist())
        written = vectors[-size:]
        assert rows.shape == (len(written),)
        for row, vector in zip(rows.tolist(), written, strict=True):
            torch.testing.assert_close(memory.vectors[row], of_unit_length(vector))
        held, known = in_order(memory)
        assert known == [label for _, label in plain.entries]
        if plain.entries:
            torch.testing.assert_close(held, torch.stack([vector for vector, _ in plain.entries]))
        assert memory.known == len(plain.entries)


def test_labels_are_unknown_where_none_were_given() -> None:
    memory = Memory(4, 2)
    memory.push_(torch.ones(4, 2), labels=torch.tensor([3, 1, 0, 2]))
    memory.push_(torch.ones(2, 2))
    assert memory.labels.tolist() == [NO_LABEL, NO_LABEL, 0, 2]
    memory.push_(torch.ones(1, 2), labels=torch.tensor([7], dtype=torch.int32))
    assert memory.labels.tolist() == [NO_LABEL, NO_LABEL, 7, 2]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_zeros_are_not_present_and_never_found(dtype: torch.dtype) -> None:
    memory = Memory(6, 2, dtype=dtype)
    pushed = -torch.ones(5, 2, dtype=dtype)  # as far from what is sought as can be: an empty row would be nearer
    pushed[1] = 0
    memory.push_(pushed)
    assert memory.present.tolist() == [True, False, True, True, True, False]
    assert memory.known == 4
    assert set(memory.search(torch.ones(3, 2, dtype=dtype), 4).flatten().tolist()) == {0, 2, 3, 4}
    with pytest.raises(InputError, match="k from 1 to the 4 embeddings"):
        memory.search(torch.ones(3, 2, dtype=dtype), 5)
    memory.push_(torch.zeros(6, 2, dtype=dtype))
    assert memory.known == 0


def test_a_vector_too_small_for_its_type_counts_as_zero() -> None:
    memory = Memory(2, 2)
    memory.push_(torch.tensor([[1e-42, 0.0], [1e-30, 1e-30]]))
    assert memory.present.tolist() == [False, True]
    torch.testing.assert_close(memory.vectors[1], torch.full((2,), 0.5**0.5))


@given(size=st.integers(1, 30), pushed=st.integers(1, 40), dim=st.integers(1, 6), data=st.data())
def test_the_search_against_a_loop(size: int, pushed: int, dim: int, data: st.DataObject) -> None:
    memory = filled(size, dim, pushed=pushed)
    k = data.draw(st.integers(1, memory.known))
    target = draws(3, dim, seed=9)
    similar = target / target.norm(dim=1, keepdim=True) @ memory.vectors.T
    found = memory.search(target, k)
    rows = [ranked(u, memory, present(memory))[:k] for u in target]
    best = [[float(near[row]) for row in best] for best, near in zip(rows, similar, strict=True)]
    assert found.shape == (3, k)
    assert all(len(set(row)) == k for row in found.tolist())
    torch.testing.assert_close(similar.gather(1, found), torch.tensor(best, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_was_just_pushed_is_its_own_nearest_neighbour(dtype: torch.dtype) -> None:
    memory = filled(300, 64, dtype=dtype)
    target = draws(20, 64, seed=5, dtype=dtype)
    rows = memory.push_(target)
    assert torch.equal(memory.search(target, 3)[:, 0], rows)


def test_after_loading_the_next_push_and_search_are_the_same() -> None:
    memory = Memory(7, 4)
    memory.push_(draws(9, 4, dtype=torch.float32), labels=torch.arange(9))
    state = {name: value.clone() if name != "place" else value for name, value in memory.state_dict().items()}
    again = Memory(7, 4)
    again.load_state_dict(state)
    assert again.place == memory.place == 2
    for each in (memory, again):
        each.push_(draws(3, 4, seed=2, dtype=torch.float32), labels=torch.arange(3))
    target = draws(5, 4, seed=3, dtype=torch.float32)
    assert torch.equal(memory.search(target, 4), again.search(target, 4))
    assert torch.equal(memory.vectors, again.vectors)
    assert torch.equal(memory.labels, again.labels)
    assert torch.equal(memory.present, again.present)
    assert not torch.equal(state["vectors"], again.vectors)  # loading copies


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"a memory of \[4, 2\]; got \[5, 2\]"):
        Memory(4, 2).load_state_dict(Memory(5, 2).state_dict())


def test_pushing_keeps_no_graph_and_no_alias() -> None:
    memory = Memory(3, 2)
    target = torch.tensor([[0.6, 0.8], [1.0, 0.0]], requires_grad=True)
    memory.push_(target)
    assert not memory.vectors.requires_grad
    with torch.no_grad():
        target.zero_()
    torch.testing.assert_close(memory.vectors[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("target", "labels", "said"),
    [
        (torch.ones(3, 5), None, r"floating embeddings \[batch, 4\]; got float32 \[3, 5\]"),
        (torch.ones(4), None, r"got float32 \[4\]"),
        (torch.ones(3, 4, dtype=torch.int64), None, r"got int64 \[3, 4\]"),
        (torch.ones(3, 4), torch.arange(2), r"labels as int64 \[3\]; got int64 \[2\]"),
        (torch.ones(3, 4), torch.ones(3), r"labels as int64 \[3\]; got float32 \[3\]"),
        (torch.ones(3, 4), torch.ones(3, dtype=torch.bool), r"got bool \[3\]"),
        (torch.ones(3, 4), torch.ones(3, 1, dtype=torch.int64), r"got int64 \[3, 1\]"),
    ],
)
def test_what_cannot_be_pushed_is_refused_and_changes_nothing(target, labels, said: str) -> None:
    memory = filled(3, 4)
    before = memory.vectors.clone()
    with pytest.raises(InputError, match=said):
        memory.push_(target, labels=labels)
    assert torch.equal(memory.vectors, before)
    assert memory.place == 0


def test_sizes_and_neighbours_out_of_range() -> None:
    for size, dim in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(InputError, match=f"got {size} x {dim}"):
            Memory(size, dim)
    for k in (0, -1, 4):
        with pytest.raises(InputError, match=f"k from 1 to the 3 embeddings in the memory; got {k}; "):
            filled(3, 2).search(draws(1, 2), k)
    with pytest.raises(InputError, match="k from 1 to the 0 embeddings"):
        Memory(3, 2).search(torch.ones(1, 2), 1)


def test_a_row_that_is_no_number_is_never_found():
    memory = Memory(4, 2)
    memory.push_(torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, float("inf")], [0.0, 1.0]]))
    assert memory.present.tolist() == [True, False, False, True]
    assert sorted(memory.search(torch.tensor([[0.6, 0.8]]), 2)[0].tolist()) == [0, 3]
    loss = mean_shift_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.6, 0.8]]), memory, k=2)
    assert bool(loss.isfinite())
