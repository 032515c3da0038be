"""What k-means and seeding leave out for the sake of time, against the same done in full."""

from __future__ import annotations

import pytest
import torch

from scrimp.primitives import cluster
from scrimp.primitives.cluster import assign, kmeans
from scrimp.primitives.seeding import Gaps, Points, nearest_of, plus_plus, squared_distances


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("count", "k", "iterations"), [(1, 1, 1), (90, 12, 3), (200, 40, 30), (200, 40, 1)])
def test_moving_by_what_changed_is_moving_by_everything(count, k, iterations, monkeypatch):
    """Lloyd's algorithm from the same start, every distance and every mean anew."""
    values = normal(count, 3, seed=count + iterations)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    partly = []
    whole = cluster._assigned_anew

    def counted(rows, centres, changed, labels, squared):
        partly.append(int(changed.sum()))
        return whole(rows, centres, changed, labels, squared)

    monkeypatch.setattr(cluster, "_assigned_anew", counted)
    found = kmeans(values, k, weights=weights, iterations=iterations, generator=torch.Generator().manual_seed(5))
    rows = values - values.mean(0)
    start = plus_plus(Gaps(Points(rows)), k, mass=weights, generator=torch.Generator().manual_seed(5))
    centres, before = rows[torch.tensor(start)], None
    for _ in range(iterations):
        labels = torch.cdist(rows, centres).argmin(1)
        if before is not None and torch.equal(labels, before):
            break
        centres = torch.stack(
            [(weights[:, None] * rows)[labels == i].sum(0) / weights[labels == i].sum() for i in range(k)]
        )
        before = labels
    assert torch.allclose(found.centres, centres + values.mean(0))
    assert torch.equal(found.labels, torch.cdist(rows, centres).argmin(1))
    assert torch.allclose(found.squared, torch.cdist(rows, centres).amin(1).square(), atol=1e-9)
    if iterations == 30:
        assert min(partly) < k // 2  # the shortcut was taken


def test_a_centre_beside_one_that_moved_loses_its_rows_and_of_equals_the_first_has_them():
    rows = torch.tensor([[0.0], [2.0], [10.0], [6.0]])
    labels, squared = torch.tensor([1, 1, 2, 1]), torch.tensor([4.0, 0.0, 0.0, 16.0])
    centres = torch.tensor([[1.0], [2.0], [10.0]])
    changed = torch.tensor([True, False, False])
    found = cluster._assigned_anew(rows, centres, changed, labels, squared)
    assert found[0].tolist() == assign(rows, centres)[0].tolist() == [0, 1, 2, 1]
    same = torch.tensor([[2.0], [2.0], [10.0]])
    found = cluster._assigned_anew(rows, same, changed, labels, squared)
    assert found[0][:2].tolist() == [0, 0]  # a tie goes to the first


def test_places_are_the_first_nearest_of_those_chosen():
    values = normal(70, 2).round()  # with many copies and ties
    gaps = Gaps(Points(values, centred=True))
    chosen = plus_plus(gaps, 37, mass=torch.ones(70), generator=torch.Generator().manual_seed(2))
    gaps.settle()
    apart = (values[:, None] - values[chosen][None]).square().sum(2)
    assert torch.equal(gaps.bounds, apart.amin(1))
    assert torch.equal(gaps.places, (apart == apart.amin(1, keepdim=True)).int().argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_is_that_of_the_whole_table(dtype):
    left, right = normal(50, 6, dtype=dtype) + 3, normal(9, 6, seed=1, dtype=dtype) + 3
    right[5] = right[2]
    left[:9] = right
    squares = left.square().sum(1), right.square().sum(1)
    table = squared_distances(*squares, left @ right.T)
    found, places = nearest_of(*squares, left @ right.T)
    expected, where = table.min(1)
    assert torch.equal(places, where)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.equal(found[:9], torch.zeros(9, dtype=dtype))
    assert int(places[5]) == 2
