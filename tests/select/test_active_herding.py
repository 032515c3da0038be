"""Greedy kernel coverage against loops over all images and all candidates."""

from __future__ import annotations

import math

import pytest
import torch

from scrimp.primitives.errors import InputError
from scrimp.select import herding
from scrimp.select.active_herding import greedy_coverage

NONE = torch.arange(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gains_of(rows, known, picks, bandwidth):
    """Of every row that may be chosen, at each choice, by the definition: coverage of all images, anew for each."""
    everyone = range(len(rows))
    squared = [[sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in everyone] for i in everyone]
    mean = sum(map(sum, squared)) / len(rows) ** 2
    similar = [[math.exp(-value / (bandwidth * mean)) for value in line] for line in squared]
    for place in range(len(picks)):
        have = [*known, *picks[:place]]
        before = [max((similar[c][x] for c in have), default=0.0) for x in everyone]
        yield {i: sum(max(similar[i][x] - before[x], 0.0) for x in everyone) for i in everyone if i not in have}


@pytest.mark.parametrize("known", [[], [1, 5, 6]])
@pytest.mark.parametrize(("count", "bandwidth"), [(7, 1.0), (31, 0.1), (31, 1.0), (30, 50.0)])
def test_each_choice_raises_the_coverage_most(count, bandwidth, known):
    values = torch.randn(count, 3, generator=seeded(count), dtype=torch.float64) + 9
    labelled = torch.tensor(known, dtype=torch.int64)
    picks = herding(values, None, labelled, 8, bandwidth=bandwidth, generator=seeded()).indices.tolist()
    assert len(picks) == min(8, count - len(known))
    for pick, gains in zip(picks, gains_of(values.tolist(), known, picks, bandwidth), strict=True):
        # Two images that gain by one another alone tie, but for rounding.
        assert gains[pick] == pytest.approx(max(gains.values()), abs=1e-12)


@pytest.mark.parametrize("count", [200, 400])
def test_looking_at_few_candidates_again_changes_nothing(count):
    """More rows than are looked at together, and more than one piece of the table."""
    values = torch.randn(count, 4, generator=seeded(count), dtype=torch.float64)
    gaps = 1 - torch.exp(-torch.cdist(values, values).square() / 8)
    uncovered = gaps[:3].amin(0)
    now, expected = uncovered.clone(), []
    for _ in range(30):
        gains = (now - gaps).clamp_min(0).sum(1)
        expected.append(int(gains.argmax()))
        now = torch.minimum(now, gaps[expected[-1]])
    before = uncovered.clone(), gaps.clone()
    assert greedy_coverage(gaps, uncovered, 30).tolist() == expected
    assert torch.equal(uncovered, before[0])
    assert torch.equal(gaps, before[1])
    # Of equals the first, and no more than bring anything.
    assert greedy_coverage(1 - torch.eye(300), torch.ones(300), 5).tolist() == [0, 1, 2, 3, 4]
    assert greedy_coverage(torch.zeros(9, 9), torch.ones(9), 5).tolist() == [0]


def test_no_copy_is_chosen_while_there_are_others():
    values = torch.randn(6, 3, generator=seeded(1)).repeat_interleave(4, 0)
    values = torch.cat([values, values[:1].repeat(5, 1)])
    first = herding(values, None, NONE, 6, bandwidth=0.1, generator=seeded()).indices.tolist()
    assert sorted(first) == [0, 4, 8, 12, 16, 20]
    rest = herding(values, None, torch.tensor([1, 6]), 99, generator=seeded()).indices.tolist()
    assert sorted(rest) == [row for row in range(29) if row not in (1, 6)]
    assert {row // 4 for row in rest[:4]} == {2, 3, 4, 5}
    assert herding(values[:1], None, NONE, 3, generator=seeded()).indices.tolist() == [0]


def test_beyond_the_sample_each_group_without_labels_is_served():
    groups = torch.arange(400) % 4
    values = torch.randn(400, 3, generator=seeded(2)) + 40 * torch.eye(4, 3)[groups]
    asked = {"bandwidth": 0.1, "sample": 60}
    found = herding(values, None, NONE, 4, **asked, generator=seeded()).indices
    assert sorted(groups[found].tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, herding(values, None, NONE, 4, **asked, generator=seeded()).indices)
    assert not torch.equal(found, herding(values, None, NONE, 4, **asked, generator=seeded(1)).indices)
    found = herding(values, None, torch.arange(0, 300, 4), 3, **asked, generator=seeded()).indices
    assert sorted(groups[found].tolist()) == [1, 2, 3]
    assert len(herding(values, None, NONE, 90, **asked, generator=seeded()).indices.unique()) == 90


@pytest.mark.parametrize("wrong", [{"bandwidth": 0.0}, {"bandwidth": float("inf")}, {"sample": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError):
        herding(torch.ones(3, 2), None, NONE, 1, **wrong, generator=seeded())
