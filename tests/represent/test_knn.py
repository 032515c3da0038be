"""Nearest-neighbour accuracy against loops and scikit-learn; ties, weights, odd sizes, mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.represent import knn
from scrimp.represent.knn import knn_accuracies, knn_accuracy


@pytest.fixture(autouse=True)
def one_thread():
    """Problems this small lose more by handing work over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clusters(count: int, *, seed: int, dim: int = 7, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping clouds around five directions, of any length."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    scale = 0.1 + 10 * torch.rand(count, 1, generator=generator)
    return (centres[labels] + 1.3 * noise) * scale, labels


def voted(train: Tensor, labels: Tensor, row: Tensor, k: int, temperature: float | None) -> int:
    """One row's class, number by number."""
    similar = [float(torch.dot(row, key) / (row.norm() * key.norm())) for key in train.double()]
    order = sorted(range(len(train)), key=lambda place: -similar[place])[:k]
    votes: dict[int, float] = {}
    for place in order:
        weight = 1.0 if temperature is None else math.exp(similar[place] / temperature)
        votes[int(labels[place])] = votes.get(int(labels[place]), 0.0) + weight
    return min(votes, key=lambda label: (-votes[label], label))


@pytest.mark.parametrize("temperature", [None, 0.1, 5.0])
@pytest.mark.parametrize("k", [1, 2, 6, 61])
def test_the_formula_in_a_loop(k, temperature):
    train, labels = clusters(61, seed=0)
    test, answers = clusters(37, seed=1)
    found = knn_accuracy(train, labels, test, answers, k=k, temperature=temperature)
    wanted = [voted(train, labels, row, k, temperature) for row in test.double()]
    assert found == sum(int(a == b) for a, b in zip(wanted, answers.tolist(), strict=True)) / 37


def test_scikit_learn_agrees():
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    (train, labels), (test, answers) = clusters(400, seed=0), clusters(300, seed=1)
    units = [torch.nn.functional.normalize(rows.double(), dim=1).numpy() for rows in (train, test)]
    for k in (1, 4, 20):
        judge = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(units[0], labels.numpy())
        assert knn_accuracy(train.double(), labels, test.double(), answers, k=k) == judge.score(
            units[1], answers.numpy()
        )


def test_several_k_share_a_search_in_pieces(monkeypatch):
    (train, labels), (test, answers) = clusters(90, seed=0), clusters(41, seed=1)
    ks, temperatures = (20, 1, 3), {20: 0.1}
    whole = knn_accuracies(train, labels, test, answers, ks=ks, temperatures=temperatures)
    assert list(whole) == [20, 1, 3]
    for k in ks:
        assert whole[k] == knn_accuracy(train, labels, test, answers, k=k, temperature=temperatures.get(k))
    searched = []
    search = knn.nearest
    monkeypatch.setattr(knn, "nearest", lambda rows, *rest: (searched.append(len(rows)), search(rows, *rest))[1])
    monkeypatch.setattr(knn, "_QUERIES", 10)
    assert knn_accuracies(train, labels, test, answers, ks=ks, temperatures=temperatures) == whole
    assert searched == [10, 10, 10, 10, 1]


def test_a_tie_goes_to_the_smallest_class_and_weights_break_it():
    train = torch.tensor([[1.0, 0.05], [1.0, 0.2], [-1.0, 0.0]])
    labels, test = torch.tensor([3, 1, 0]), torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=2) == 1
    assert knn_accuracy(train, labels, test, torch.tensor([3]), k=2, temperature=0.1) == 1
    assert knn_accuracy(train, labels, test, torch.tensor([3]), k=2, temperature=1e-8) == 1  # no overflow


def test_length_does_not_count_and_arguments_stay():
    (train, labels), (test, answers) = clusters(50, seed=0), clusters(30, seed=1)
    before = train.clone(), test.clone()
    scales = torch.linspace(0.001, 1000, 50)[:, None]
    first, second = (knn_accuracy(rows, labels, test, answers, k=5) for rows in (train, train * scales))
    assert first == second
    assert torch.equal(train, before[0])
    assert torch.equal(test, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    (train, labels), (test, answers) = clusters(50, seed=0), clusters(30, seed=1)
    train, test = train.to(dtype), test.to(dtype)
    found = knn_accuracy(train, labels.int(), test, answers.to(torch.uint8), k=3)
    assert found == knn_accuracy(train.double(), labels, test.double(), answers, k=3)


def test_one_row_zeros_and_strange_classes():
    one = torch.ones(1, 1)
    assert knn_accuracy(one, torch.tensor([4]), one, torch.tensor([4]), k=1) == 1
    assert knn_accuracy(one, torch.tensor([0]), torch.zeros(1, 1), torch.tensor([0]), k=1) == 1
    test, answers = torch.ones(2, 1), torch.tensor([7, 0])  # 7 was never seen in training: wrong, no error
    assert knn_accuracy(one, torch.tensor([0]), test, answers, k=1) == 0.5


def test_mistakes_are_told():
    (train, labels), (test, answers) = clusters(9, seed=0), clusters(5, seed=1)

    def said(*arguments: Tensor, **settings: object) -> str:
        given = (*arguments, train, labels, test, answers)[:4] if arguments else (train, labels, test, answers)
        with pytest.raises(InputError) as error:
            knn_accuracies(*given, **{"ks": (1,), **settings})
        return str(error.value)

    assert "1 to 9 neighbours" in said(ks=(1, 10))
    assert "1 to 9 neighbours" in said(ks=(0,))
    assert "got none" in said(ks=())
    assert "temperature above 0" in said(temperatures={1: 0.0})
    assert "one of 3" in said(temperatures={3: 0.1})
    assert "one width" in said(train, labels, test[:, :3], answers)
    assert "n and dim at least 1" in said(train[:0], labels[:0], test, answers)
    assert "n and dim at least 1" in said(train, labels, test[:0], answers[:0])
    assert "n and dim at least 1" in said(train[0], labels, test, answers)
    assert "floating-point" in said(train.long(), labels, test, answers)
    assert "int64 [9]" in said(train, labels[:8], test, answers)
    assert "int64 [5]" in said(train, labels, test, answers.float())
    assert "class numbers from 0" in said(train, labels - 1, test, answers)
    assert "finite" in said(train, labels, test / 0, answers)
