"""Seeding and clustering of features against brute force."""

from __future__ import annotations

import pytest
import torch

from scrimp.primitives.cluster import assign, kmeans
from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import Gaps, Points, plus_plus


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_gaps_of_factors_are_those_of_outer_products():
    left, right = normal(40, 3), normal(40, 5, seed=1)
    whole = torch.einsum("ni,nj->nij", left, right).flatten(1)
    gaps = Gaps(Points(left, right))
    chosen = plus_plus(gaps, 21, mass=torch.ones(40), generator=seeded())
    assert len(set(chosen)) == 21
    expected = (whole[:, None] - whole[chosen][None]).square().sum(2).amin(1)
    assert len(gaps.pending) == 4  # in between two passes the bounds are only bounds
    assert bool((gaps.bounds >= expected - 1e-12).all())
    assert bool((gaps.bounds > expected + 1e-3).any())
    assert torch.allclose(gaps.at(torch.arange(40)), expected)
    gaps.settle()
    assert torch.allclose(gaps.bounds, expected)
    with pytest.raises(InputError):
        Points(left, right[:5])


def test_draws_follow_mass_and_copies_come_last():
    values = torch.tensor([[0.0], [0.0], [3.0], [3.0], [9.0]])
    mass = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    for seed in range(5):
        found = plus_plus(Gaps(Points(values)), 9, mass=mass, generator=seeded(seed))
        assert sorted(found) == [0, 1, 2, 4]
        assert found[-1] in (0, 1)
    heavy = torch.tensor([0.0, 0.0, 1.0, 0.0, 1e-9])
    assert plus_plus(Gaps(Points(values)), 1, mass=heavy, generator=seeded()) == [2]


def test_float32_about_a_far_mean_keeps_its_digits():
    values = (normal(50, 4) + 1e3).float()
    gaps = Gaps(Points(values))
    gaps.include(torch.tensor([7, 11]))
    wide = values.double()
    expected = (wide[:, None] - wide[[7, 11]][None]).square().sum(2).amin(1)
    assert torch.allclose(gaps.bounds.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (9, 9), (40, 5)])
def test_kmeans_ends_where_nothing_moves(count, k):
    values, weights = normal(count, 3) + 50, torch.rand(count, generator=seeded(), dtype=torch.float64) + 0.1
    found = kmeans(values, k, weights=weights, iterations=100, generator=seeded())
    apart = (values[:, None] - found.centres[None]).square().sum(2)
    assert torch.equal(found.labels, apart.argmin(1))
    assert torch.allclose(found.squared, apart.amin(1), atol=1e-9)
    for index in range(k):
        members = found.labels == index
        mean = (weights[members, None] * values[members]).sum(0) / weights[members].sum()
        assert torch.allclose(found.centres[index], mean)


def test_kmeans_of_some_rows_by_a_few_of_them():
    groups = torch.arange(300) % 3
    values = (normal(300, 4) + 80 * torch.eye(4, dtype=torch.float64)[groups]).float()
    among = (groups < 2).nonzero().flatten()
    found = kmeans(values, 2, among=among, batch=10, generator=seeded())
    assert len(set(zip(groups[among].tolist(), found.labels.tolist(), strict=True))) == 2
    again = kmeans(values, 2, among=among, batch=10, generator=seeded())
    assert torch.equal(found.centres, again.centres)
    assert assign(values[:0], found.centres)[0].shape == (0,)
    for k, settings in [(0, {}), (301, {}), (2, {"iterations": 0}), (2, {"batch": 0})]:
        with pytest.raises(InputError):
            kmeans(values, k, **settings, generator=seeded())
